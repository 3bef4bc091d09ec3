"""Everything in an artifact folder that is derived from the artifact."""

from pathlib import Path

from distilled_data.files import write_file
from distilled_data.format import ARTIFACT_FILE, CARD_FILE, PARQUET_FILE, PREVIEW_FILE, read_artifact
from distilled_data.manifest import write_manifest

from .card import read_card, render_card
from .mirror import parquet_bytes
from .preview import preview_png


def complete_folder(folder: str | Path) -> None:
    """Write card, parquet mirror, preview and, last, the manifest beside the artifact.

    The same artifact gives the same bytes. A card that is there keeps what people wrote, see `render_card`.
    Raises `FormatError` when the artifact cannot be read, `UsageError` for such a card, and `OutputError`
    when a file cannot be written.
    """
    folder = Path(folder)
    artifact = read_artifact(folder / ARTIFACT_FILE)
    existing = read_card(folder)
    write_file(folder / PARQUET_FILE, parquet_bytes(artifact))
    write_file(folder / PREVIEW_FILE, preview_png(artifact))
    write_file(folder / CARD_FILE, render_card(artifact, existing).encode())
    write_manifest(folder)
