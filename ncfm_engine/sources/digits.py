"""Handwritten digits of 8 x 8 pixels, in a file beside this one: the source that needs no network.

`digits.csv.gz` is the test set of the UCI repository (optdigits.tes, CC BY 4.0) as scikit-learn has it: 64
values of 0 to 16 and the label per line.
"""

from pathlib import Path

import numpy as np

from .reader import ArrayReader, Origin

_CITATION = """@misc{alpaydin1998optdigits,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49}
}"""
_RELEASE = "doi:10.24432/C50P49"


def read_digits() -> ArrayReader:
    """1,797 grey images in 10 classes."""
    rows = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), np.uint8, delimiter=",")
    images = (rows[:, :64].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    origin = Origin("digits", "uci:optdigits", _RELEASE, "CC-BY-4.0", _CITATION)
    return ArrayReader(
        origin, [str(digit) for digit in range(10)], {"train": (images, rows[:, 64])}, _RELEASE
    )
