"""Which sets are made, and the figures that were published for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ncfm_engine.networks import QUARTER

ARCHITECTURES = ("resnet18", "vgg11", "alexnet")  # of the paper's cross-architecture table


@dataclass(frozen=True)
class Row:
    """One set: a preset with `changes`."""

    name: str  # of its folder
    preset: str
    changes: Mapping[str, str] = field(default_factory=dict)
    # To the evaluation with the other architectures, which cost 3 to 11 times as much.
    architectures: Mapping[str, str] = field(default_factory=lambda: {"evaluate.repeats": "3"})
    scale: str = ""  # of these architectures, or `QUARTER`


# Of the training images that the paper used, whatever form they come in.
FINGERPRINTS = {
    "f1722789a7a6b320fa68a1b8a0b4a41c57af11f8cf296b80740f850eedf14a9b": "cifar10",
    "0696c7f268012447137c5fa6f679766e3ecb3cf7f99ff361f89f65ec7750fe5d": "cifar100",
}
# NCFM, arXiv 2502.20653: Table 1, ConvNet-3; cross-architecture accuracies of the same paper.
PAPER = {
    ("cifar10", 1): 49.5,
    ("cifar10", 10): 71.8,
    ("cifar10", 50): 77.4,
    ("cifar100", 1): 34.4,
    ("cifar100", 10): 48.7,
    ("cifar100", 50): 54.7,
}
PAPER_ARCHITECTURES = {
    ("cifar10", 10): {"alexnet": 67.9, "vgg11": 68.0, "resnet18": 67.7},
    ("cifar10", 50): {"alexnet": 75.5, "vgg11": 75.5, "resnet18": 73.8},
}
# What users of the reference implementation wrote: issues 5, 10 and 14 of gszfwsb/NCFM.
REPORTED = {("cifar10", 1): "~36", ("cifar10", 50): "~72"}


# The sets of the paper, the most telling first, and what a short time has for them: steps of matching, and
# epochs of evaluation, which are 2,000 to 12,000 optimiser steps.
_SETS = {
    ("cifar10", 10): (6000, 750),
    ("cifar100", 10): (3000, 200),
    ("cifar10", 50): (3000, 250),
    ("cifar100", 50): (1500, 75),
    ("cifar10", 1): (6000, 2000),
    ("cifar100", 1): (6000, 1000),
}


def _set(dataset: str, ipc: int, changes: Mapping[str, str], **options: Any) -> Row:
    return Row(f"{dataset}-ipc{ipc}", f"{dataset}-ipc{ipc}", changes, **options)


# What the studies found to be better, and soft labels besides hard ones.
_KEPT = {"distill.calibration": "100", "evaluate.labels": "hard,soft"}
_SHORT = _KEPT | {
    "pretrain.networks": "8",
    "pretrain.epochs": "12",
    "pretrain.learning_rate": "0.05",
    "pretrain.precision": "bfloat16",
    "distill.frequencies": "1024",
    "distill.learning_rate": "0.01",
    "distill.schedule": "cosine",
    "distill.precision": "bfloat16",
    "evaluate.repeats": "3",
    "evaluate.full_epochs": "12",
    "evaluate.full_repeats": "1",
    "evaluate.precision": "bfloat16",
}
_ONCE = {"evaluate.repeats": "1", "evaluate.epochs": "60"}

TABLES: Mapping[str, tuple[Row, ...]] = {
    "published": tuple(_set(*of, {}) for of in _SETS),
    # The same on a borrowed GPU: less of everything, and the coarse numbers that it is fast with.
    "half-hour": tuple(
        _set(
            *of,
            _SHORT | {"distill.iterations": str(steps), "evaluate.epochs": str(epochs)},
            architectures={"evaluate.repeats": "1"},
        )
        for of, (steps, epochs) in _SETS.items()
    ),
    # On a CPU core each, one to two hours for each set. All networks have a quarter of the paper's width.
    "small": (
        Row(
            "cifar10-ipc10",
            "cifar10-small-ipc10",
            _KEPT | {"distill.iterations": "2000", "evaluate.epochs": "200"},
            {"evaluate.repeats": "1", "evaluate.epochs": "100"},
            QUARTER,
        ),
        Row(
            "cifar10-ipc1",
            "cifar10-small-ipc1",
            _KEPT | {"distill.iterations": "20000"},
            {"evaluate.repeats": "1"},
            QUARTER,
        ),
        Row(
            "cifar100-ipc1",
            "cifar100-small-ipc1",
            _KEPT | {"distill.iterations": "2000"},
            {"evaluate.repeats": "1", "evaluate.epochs": "100"},
            QUARTER,
        ),
    ),
    # The embedded digits, in minutes.
    "digits": (
        Row("digits-ipc10", "digits", {"ipc": "10"}, _ONCE),
        Row("digits-ipc1", "digits", {"ipc": "1"}, _ONCE),
    ),
}
