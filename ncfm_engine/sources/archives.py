"""Published data sets that torchvision can download and read."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np

from distilled_data.errors import MissingExtraError, SourceError
from distilled_data.files import make_folder

from ..cache import cache_folder
from ..stop import in_turn
from .reader import PARTS, Damage, Origin, Record, Unit, stamp

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


class ArchiveReader:
    """The data set `name` of `ARCHIVES` in `data`, or in the user's cache after a download."""

    def __init__(self, name: str, data: str | Path | None):
        self.name, self.downloaded = name, data is None
        self.where, self.archive = name, (archive := ARCHIVES[name])
        self.root = cache_folder() / "sources" if data is None else Path(data).expanduser()
        self.origin = Origin(
            name,
            f"torchvision:{archive.dataset}",
            f"torchvision {version('torchvision').partition('+')[0]}",
            archive.license,
            archive.citation,
        )
        files = [self.root / archive.folder / file for file in archive.files]
        if not all(file.is_file() for file in files):
            with contextlib.ExitStack() as held:
                if self.downloaded:  # torchvision would write over what another process has of it
                    make_folder(self.root)
                    held.enter_context(in_turn(self.root / f".{name}.lock", None, f"download {name}"))
                for part in PARTS:
                    self._load(part)  # downloads it, or says what is missing
        stamps = [[file.name, *stamp(file)] for file in files]
        self.units = [Unit(part, stamps) for part in PARTS]

    @cached_property
    def classes(self) -> Sequence[str]:
        return self._load("test")[0]

    def read(self, unit: Unit) -> Iterator[Record | Damage]:
        _, images, labels = self._load(unit.part)
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield Record(f"{unit.part} image {row}", int(label), image)

    def _load(self, part: str) -> tuple[Sequence[str], np.ndarray, np.ndarray]:
        """Class names, uint8 images [N, height, width] or [N, height, width, 3], labels [N]."""
        try:
            # The CIFAR files are pickles; torchvision unpickles them only after their md5 matched.
            return self._read(part)
        except ImportError as error:
            raise MissingExtraError.of(error.name or "scipy", "data", f"the dataset {self.name!r}") from error
        except MemoryError:  # says nothing about the files
            raise
        except Exception as error:  # damaged bytes raise nearly anything in the readers below torchvision
            raise SourceError(self._diagnosis(error)) from error

    def _read(self, part: str) -> tuple[Sequence[str], np.ndarray, np.ndarray]:
        import torchvision  # here, because it takes two seconds that no other source needs

        dataset = getattr(torchvision.datasets, self.archive.dataset)
        if self.archive.dataset == "SVHN":  # the odd one out in arguments, names and layout
            loaded = dataset(self.root, split=part, download=self.downloaded)
            classes = [str(digit) for digit in range(10)]
            images, labels = loaded.data.transpose(0, 2, 3, 1), loaded.labels
        else:
            loaded = dataset(self.root, train=part == "train", download=self.downloaded)
            classes, images, labels = loaded.classes, np.asarray(loaded.data), np.asarray(loaded.targets)
        if len(images) != len(labels) or set(np.unique(labels)) != set(range(len(classes))):
            raise ValueError(f"{len(images)} images and {len(labels)} labels that do not fit")
        return classes, images, labels

    def _diagnosis(self, error: Exception) -> str:
        archive, reason = self.archive, str(error).removesuffix(" You can use download=True to download it")
        missing = [file for file in archive.files if not (self.root / archive.folder / file).is_file()]
        state = (
            f"missing are {', '.join(missing)}" if missing else "all are there, so one at least is damaged"
        )
        if self.downloaded:
            action = "downloaded to"
            way_out = (
                "Delete damaged files, check network and free space, and run again; or get the files from "
                f"{archive.url} and name their folder with --data."
            )
        else:
            action = "read from"
            way_out = f"Get the files from {archive.url}, or leave out --data to download them."
        return (
            f"the dataset {self.name!r} could not be {action} {self.root}: {reason.rstrip('.')}. Expected in "
            f"{self.root / archive.folder}: {', '.join(archive.files)}; {state}. {way_out}"
        )
