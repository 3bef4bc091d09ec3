"""Resizing with Pillow, whose integer arithmetic gives the same pixels on every machine."""

import numpy as np
from PIL import Image, ImageOps


def resize(image: Image.Image, size: int) -> Image.Image:
    """Shrink or grow to size x size pixels, antialiased bicubic; the longer side is cropped at both ends."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def resize_all(images: np.ndarray, size: int | None) -> np.ndarray:
    """`resize` for uint8 [N, height, width] or [N, height, width, 3]; None leaves them as they are."""
    if size is None:
        return images
    return np.stack([np.asarray(resize(Image.fromarray(image), size)) for image in images])
