"""The parts of the README, and of the page of all results, that are made from result files.

<!-- begin: tools/results/small/table.md -->
... the content of that file ...
<!-- end -->
"""

import json
import re
from pathlib import Path

from distilled_data import UsageError
from distilled_data.files import write_file
from tools.architectures import report

from . import findings, summary
from .campaign import TABLE_FILE

PAGES = ("README.md", "tools/results/README.md")
PART = re.compile(r"^<!-- begin: (\S+) -->\n.*?^<!-- end -->$", re.DOTALL | re.MULTILINE)
IPC = re.compile(r"-ipc\d+$")


def render_results(results: Path) -> dict[Path, str]:
    """The Markdown of every table and every study below `results`, by the file where it belongs."""
    tables = {path: json.loads(path.read_text()) for path in sorted(results.glob("*/results.json"))}
    pages = {path.with_name(TABLE_FILE): summary.markdown(content) for path, content in tables.items()}
    pages[results / "headline.md"] = summary.headline(
        {path.parent.name: content for path, content in tables.items()}
    )
    searches = {path: json.loads(path.read_text()) for path in sorted(results.glob("*/*/search.json"))}
    for path, content in searches.items():
        pages[path.with_name(report.REPORT_FILE)] = report.markdown(content)
    for folder in {path.parent.parent for path in searches}:
        found = [content for path, content in searches.items() if path.parent.parent == folder]
        pages[folder / "searches.md"] = report.comparison(found)
    studies: dict[str, list[Path]] = {}
    for path in sorted(results.glob("study-*.json")):
        studies.setdefault(IPC.sub("", path.stem), []).append(path)
    for name, files in studies.items():
        pages[results / f"{name}.md"] = findings.markdown(files)
    return pages


def fill(text: str, root: Path) -> str:
    """`text` with every marked part replaced by its file. Raises `UsageError` for one that does not exist."""

    def part(match: re.Match[str]) -> str:
        path = root / match[1]
        if not path.exists():
            raise UsageError(f"a page has a part for {match[1]}, which does not exist")
        return f"<!-- begin: {match[1]} -->\n{path.read_text(encoding='utf-8')}<!-- end -->"

    return PART.sub(part, text)


def update(root: Path) -> list[Path]:
    """Write all of it anew below the folder of the project; what was changed."""
    pages = render_results(root / "tools" / "results")
    changed = [
        path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in changed:
        write_file(path, pages[path].encode())
    for page in (root / name for name in PAGES):
        text = fill(page.read_text(encoding="utf-8"), root)
        if text != page.read_text(encoding="utf-8"):
            write_file(page, text.encode())
            changed.append(page)
    return changed
