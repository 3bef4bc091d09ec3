"""Handwritten digits of 8 x 8 pixels that come with scikit-learn: the source that needs no network."""

from importlib.metadata import version

import numpy as np

from distilled_data.errors import MissingExtraError

from .resize import resize_all
from .source import TEST_FRACTION, LabelledImages, Source, split

_CITATION = """@misc{alpaydin1998optdigits,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49}
}"""


def load_digits(size: int | None, seed: int) -> Source:
    """1,797 grey images in 10 classes; `seed` draws the test split, which the original lacks."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "engine", "the dataset 'digits'") from error
    values, targets = datasets.load_digits(return_X_y=True)  # values 0..16, [1797, 64]
    images = (values.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    classes = [str(digit) for digit in range(10)]
    labelled = LabelledImages.from_arrays(resize_all(images, size), targets, len(classes))
    train, test = split(labelled, classes, TEST_FRACTION, seed)
    return Source.from_splits(
        classes,
        train,
        test,
        name="digits",
        id="scikit-learn:load_digits",
        revision=f"scikit-learn {version('scikit-learn')}",
        license="CC-BY-4.0",
        citation=_CITATION,
    )
