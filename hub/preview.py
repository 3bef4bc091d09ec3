"""The contact sheet: packed images as they are stored, one row per class."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distilled_data import Artifact, MissingExtraError

MAX_CLASSES = 20
MAX_IMAGES = 10  # per class
CELL = 48  # pixels: smaller images are enlarged by a whole number to at least this
GAP = 4  # pixels
MAX_NAME = 160  # pixels of a class name before it is cut
FONT_SIZE = 14  # pixels

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def preview_png(artifact: Artifact) -> bytes:
    """A PNG of the first images of the first classes, with a line that says so when there are more."""
    metadata = artifact.metadata
    images = artifact.images[:MAX_IMAGES, :MAX_CLASSES]
    columns, rows = images.shape[:2]
    grid = _grid(images)
    names, font = _drawable(metadata.classes[:rows])
    names = [_shorten(name, font) for name in names]
    left = GAP + max(int(font.getlength(name)) for name in names) + 2 * GAP
    cell = (grid.height - GAP) // rows
    note = []
    if rows < len(metadata.classes):
        note.append(f"first {rows} of {len(metadata.classes)} classes")
    if columns < metadata.ipc:
        note.append(f"first {columns} of {metadata.ipc} images per class")
    caption = ", ".join(note)
    footer = FONT_SIZE + 2 * GAP if caption else 0
    width = left + max(grid.width, int(font.getlength(caption)) + 2 * GAP)

    sheet = Image.new("RGB", (width, grid.height + footer), "white")
    sheet.paste(grid, (left, 0))
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        middle = GAP + row * cell + (cell - GAP) // 2
        draw.text((left - GAP, middle), name, "black", font, anchor="rm")
    draw.text((left + GAP, grid.height + footer // 2), caption, "dimgray", font, anchor="lm")
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def _grid(images: Tensor) -> Image.Image:
    """uint8 [columns, rows, channels, height, width] as one RGB picture with white gaps all round."""
    columns, rows, channels, height, width = images.shape
    scale = max(1, -(-CELL // min(height, width)))
    large = images.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    cells = torch.nn.functional.pad(large, (GAP, 0, GAP, 0), value=255)
    sheet = cells.permute(2, 1, 3, 0, 4).reshape(channels, rows * cells.shape[3], columns * cells.shape[4])
    sheet = torch.nn.functional.pad(sheet, (0, GAP, 0, GAP), value=255)
    return Image.fromarray(sheet.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _drawable(names: Sequence[str]) -> tuple[list[str], Font]:
    """The names, and a font that has their letters; the class's number in the place of one that none has."""
    if "".join(names).isascii():
        return list(names), ImageFont.load_default(FONT_SIZE)  # it has nothing else
    with MissingExtraError.unless("matplotlib", "engine", "the preview"):
        import matplotlib
        from matplotlib.ft2font import FT2Font
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    letters = FT2Font(str(file)).get_charmap()
    shown = [
        name if all(ord(letter) in letters or letter.isspace() for letter in name) else f"class {number}"
        for number, name in enumerate(names)
    ]
    return shown, ImageFont.truetype(str(file), FONT_SIZE)


def _shorten(name: str, font: Font) -> str:
    name = shown = " ".join(name.split())
    while font.getlength(shown) > MAX_NAME:
        name = name[:-1]
        shown = name + "..."
    return shown
