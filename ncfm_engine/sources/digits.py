"""Handwritten digits of 8 x 8 pixels that come with scikit-learn: the source that needs no network."""

from importlib.metadata import version

import numpy as np

from distilled_data.errors import MissingExtraError

from .reader import ArrayReader, Origin

_CITATION = """@misc{alpaydin1998optdigits,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49}
}"""


def read_digits() -> ArrayReader:
    """1,797 grey images in 10 classes."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError.of("scikit-learn", "engine", "the dataset 'digits'") from error
    values, labels = datasets.load_digits(return_X_y=True)  # values 0..16, [1797, 64]
    images = (values.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    parts = {"train": (images, np.asarray(labels))}
    release = f"scikit-learn {version('scikit-learn')}"
    origin = Origin("digits", "scikit-learn:load_digits", release, "CC-BY-4.0", _CITATION)
    return ArrayReader(origin, [str(digit) for digit in range(10)], parts, release)
