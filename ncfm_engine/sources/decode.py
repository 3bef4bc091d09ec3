"""One image of any kind as 8-bit grey or RGB pixels, or the reason why not."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from distilled_data.pictures import check_depth, check_opaque

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM")  # Pillow must not try others, whatever the name
FITS = ("crop", "squash")

_MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB"}
_MODES |= {"CMYK": "RGB", "YCbCr": "RGB"}  # 8 bits too; by Pillow's formula, without a colour profile

_Box = tuple[float, float, float, float]


class Refused(Exception):  # noqa: N818 - it is the data that is wrong
    """An image that cannot be used. The message says why."""


@dataclass(frozen=True)
class Decoder:
    """What is done to every image of a source.

    `size` in pixels makes them square, shrunk or grown with antialiasing: "crop" cuts off both ends of the
    longer side, "squash" keeps all of it. `channels` 1 or 3 converts to grey or colour, None does neither.
    """

    size: int | None = None
    fit: str = "crop"
    channels: int | None = None

    def __call__(self, image: bytes | np.ndarray) -> np.ndarray:
        """uint8 [channels, height, width] of a file's bytes or of pixels [height, width(, 3)].

        Turned upright as EXIF says; of an animation the first frame. Raises `Refused`.
        """
        if isinstance(image, np.ndarray):
            as_it_is = self.size is None and self.channels is None
            return _planes(image) if as_it_is else self._fitted(Image.fromarray(image))
        if not image:
            raise Refused("the file is empty")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 million pixels
                with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
                    check_depth(opened)
                    # Of a JPEG a fraction is decoded that is large enough.
                    draft = None if self.size is None else opened.draft(None, (2 * self.size, 2 * self.size))
                    orientation = _orientation(opened)
                    upright = ImageOps.exif_transpose(opened) if orientation else opened
                    box = draft and _box(upright.size, draft[1][2:], orientation)
                    return self._fitted(_plain(upright), box)
        except (Refused, MemoryError):
            raise
        except UnidentifiedImageError as error:
            raise Refused(f"no image of a known format ({', '.join(FORMATS)})") from error
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise Refused(str(error) or type(error).__name__) from error

    def _fitted(self, image: Image.Image, box: _Box | None = None) -> np.ndarray:
        """Of what is in `box`, if that is not all."""
        if self.channels is not None:
            image = image.convert("L" if self.channels == 1 else "RGB")
        if self.size is not None:
            left, top, right, bottom = box or (0, 0, *image.size)
            if self.fit == "crop":
                side = min(right - left, bottom - top)
                left, top = left + (right - left - side) / 2, top + (bottom - top - side) / 2
                right, bottom = left + side, top + side
            # Pillow's integer arithmetic gives the same pixels on every machine.
            size = (self.size, self.size)
            image = image.resize(size, Image.Resampling.BICUBIC, (left, top, right, bottom))
        return _planes(np.asarray(image))


def _planes(pixels: np.ndarray) -> np.ndarray:
    """[channels, height, width] of pixels [height, width(, 3)]."""
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _box(size: tuple[int, int], picture: Sequence[float], orientation: int | None) -> _Box:
    """Left, top, right and bottom of a `picture`, width and height as stored, in an image turned upright.

    The fraction of a JPEG is rounded up to whole pixels: before it is turned, the image has a part of a pixel
    too much at the right and below, which would shift what is made of it.
    """
    width, height = picture[::-1] if orientation in (5, 6, 7, 8) else picture
    left = size[0] - width if orientation in (2, 3, 6, 7) else 0
    top = size[1] - height if orientation in (3, 4, 7, 8) else 0
    return left, top, left + width, top + height


def _orientation(image: Image.Image) -> int | None:
    """How the image is to be turned; one whose facts cannot be read is taken as it is."""
    try:
        return image.getexif().get(0x0112)
    except Exception:  # their reader raises nearly anything
        return None


def _plain(image: Image.Image) -> Image.Image:
    """The same pixels in mode L or RGB. Raises `Refused` where that would lose something."""
    mode = _MODES.get(image.mode)
    if mode is None:
        raise Refused(
            f"pixels of Pillow's mode {image.mode!r} cannot become 8-bit grey or RGB without a loss; "
            "convert it to one of these"
        )
    check_opaque(image)
    return image.convert(mode)
