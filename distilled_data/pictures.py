"""What an image would lose as 8-bit grey or RGB pixels, which Pillow drops without a word."""

from typing import Any


def check_depth(image: Any) -> None:
    """Raise `ValueError` for a file that was opened, not yet decoded, and has 16 bits per channel."""
    for codec, _, _, arguments in image.tile:
        facts = arguments if isinstance(arguments, tuple) else (arguments,)
        # BGR;16 has 5 or 6 bits per channel
        deep = any(isinstance(fact, str) and ";16" in fact and not fact.startswith("BGR") for fact in facts)
        if deep or (codec.startswith("ppm") and any(isinstance(fact, int) and fact > 255 for fact in facts)):
            raise ValueError("16 bits per channel cannot become 8 without a loss; convert it to 8")


def check_opaque(image: Any) -> None:
    """Raise `ValueError` for an image that can be looked through anywhere."""
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise ValueError("transparent pixels; flatten it onto a background of your choice")
