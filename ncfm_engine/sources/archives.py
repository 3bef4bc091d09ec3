"""Published data sets that torchvision can download and read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distilled_data.errors import MissingExtraError, SourceError

from ..cache import cache_folder
from .resize import resize_all
from .source import LabelledImages, Source

_KRIZHEVSKY = """@techreport{krizhevsky2009learning,
  author = {Krizhevsky, Alex},
  title = {Learning Multiple Layers of Features from Tiny Images},
  institution = {University of Toronto},
  year = {2009}
}"""

_LECUN = """@article{lecun1998gradient,
  author = {LeCun, Yann and Bottou, L{\\'e}on and Bengio, Yoshua and Haffner, Patrick},
  title = {Gradient-Based Learning Applied to Document Recognition},
  journal = {Proceedings of the IEEE},
  volume = {86},
  number = {11},
  pages = {2278--2324},
  year = {1998}
}"""

_XIAO = """@article{xiao2017fashion,
  author = {Xiao, Han and Rasul, Kashif and Vollgraf, Roland},
  title = {Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms},
  journal = {arXiv preprint arXiv:1708.07747},
  year = {2017}
}"""

_NETZER = """@inproceedings{netzer2011reading,
  author = {Netzer, Yuval and Wang, Tao and Coates, Adam and Bissacco, Alessandro and Wu, Bo and
    Ng, Andrew Y.},
  title = {Reading Digits in Natural Images with Unsupervised Feature Learning},
  booktitle = {NIPS Workshop on Deep Learning and Unsupervised Feature Learning},
  year = {2011}
}"""

_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class _Archive:
    dataset: str  # class in torchvision.datasets
    folder: str  # below the data folder
    files: tuple[str, ...]  # in that folder
    url: str  # where a person can get them
    license: str
    citation: str


ARCHIVES = {
    "cifar10": _Archive(
        "CIFAR10",
        "cifar-10-batches-py",
        (*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch", "batches.meta"),
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "unknown",
        _KRIZHEVSKY,
    ),
    "cifar100": _Archive(
        "CIFAR100",
        "cifar-100-python",
        ("train", "test", "meta"),
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "unknown",
        _KRIZHEVSKY,
    ),
    "mnist": _Archive(
        "MNIST",
        "MNIST/raw",
        _IDX_FILES,
        "https://yann.lecun.com/exdb/mnist/",
        "CC-BY-SA-3.0",
        _LECUN,
    ),
    "fashion_mnist": _Archive(
        "FashionMNIST",
        "FashionMNIST/raw",
        _IDX_FILES,
        "https://github.com/zalandoresearch/fashion-mnist",
        "MIT",
        _XIAO,
    ),
    "svhn": _Archive(
        "SVHN",
        "",
        ("train_32x32.mat", "test_32x32.mat"),
        "http://ufldl.stanford.edu/housenumbers/",
        "other",  # "for non-commercial use only"
        _NETZER,
    ),
}


def load_archive(name: str, data: str | Path | None, size: int | None) -> Source:
    """Read the data set `name` of `ARCHIVES` from `data`, or from the user's cache after a download."""
    import torchvision  # here, because it takes two seconds that no other source needs

    archive = ARCHIVES[name]
    dataset = getattr(torchvision.datasets, archive.dataset)
    root = cache_folder() / "sources" if data is None else Path(data).expanduser()
    try:
        # The CIFAR files are pickles; torchvision unpickles them only after their md5 matched.
        classes, train = _read(dataset, root, "train", download=data is None)
        _, test = _read(dataset, root, "test", download=data is None)
    except ImportError as error:
        raise MissingExtraError(error.name or "scipy", "engine", f"the dataset {name!r}") from error
    except Exception as error:  # damaged bytes raise nearly anything in the readers below torchvision
        raise SourceError(_diagnosis(name, root, downloaded=data is None, error=error)) from error
    parts = [
        LabelledImages.from_arrays(resize_all(images, size), targets, len(classes))
        for images, targets in (train, test)
    ]
    return Source.from_splits(
        classes,
        *parts,
        name=name,
        id=f"torchvision:{archive.dataset}",
        revision=f"torchvision {torchvision.__version__.partition('+')[0]}",
        license=archive.license,
        citation=archive.citation,
    )


def _read(dataset: Any, root: Path, part: str, *, download: bool):
    """(class names, (uint8 images [N, height, width] or [N, height, width, 3], labels [N]))"""
    if dataset.__name__ == "SVHN":  # the odd one out in arguments, names and layout
        loaded = dataset(root, split=part, download=download)
        classes = [str(digit) for digit in range(10)]
        images, targets = loaded.data.transpose(0, 2, 3, 1), loaded.labels
    else:
        loaded = dataset(root, train=part == "train", download=download)
        classes, images, targets = loaded.classes, np.asarray(loaded.data), np.asarray(loaded.targets)
    if len(images) != len(targets) or set(np.unique(targets)) != set(range(len(classes))):
        raise ValueError(f"{len(images)} images and {len(targets)} labels that do not fit")
    return classes, (images, targets)


def _diagnosis(name: str, root: Path, *, downloaded: bool, error: Exception) -> str:
    archive = ARCHIVES[name]
    missing = [file for file in archive.files if not (root / archive.folder / file).is_file()]
    state = f"missing are {', '.join(missing)}" if missing else "all are there, so one at least is damaged"
    if downloaded:
        action = "downloaded to"
        way_out = (
            "Delete damaged files, check network and free space, and run again; or get the files from "
            f"{archive.url} and name their folder with --data."
        )
    else:
        action = "read from"
        way_out = f"Get the files from {archive.url}, or leave out --data to download them."
    return (
        f"the dataset {name!r} could not be {action} {root}: {error}. Expected in "
        f"{root / archive.folder}: {', '.join(archive.files)}; {state}. {way_out}"
    )
