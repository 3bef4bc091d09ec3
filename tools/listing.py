"""JSON files of results that a person can read, and compare line by line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilled_data.files import write_file


def write_rows(path: Path, head: Mapping[str, Any], name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A JSON object of `head` and the list `name`, with a line for each entry of either."""
    lines = [f" {json.dumps(field)}: {json.dumps(value)}" for field, value in head.items()]
    listed = ",\n".join("  " + json.dumps(row) for row in rows)
    text = "{\n" + ",\n".join([*lines, f' "{name}": [\n{listed}\n ]']) + "\n}\n"
    write_file(path, text.encode())
