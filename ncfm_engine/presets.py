"""Presets: one row, one published result (or one small machine's version of it).

Precedence: the defaults of `config`, then the row, then the flags of a command line.
"""

from dataclasses import dataclass, field
from typing import Any

from distilled_data import UnknownNameError
from distilled_data.augment import DSA_OF_DIGITS

from .config import Recipe


@dataclass(frozen=True)
class Preset:
    """`changes` are dotted settings of a `Recipe`; `size` resizes a folder's images (pixels)."""

    dataset: str
    ipc: int
    changes: dict[str, Any] = field(default_factory=dict)
    size: int | None = None

    def recipe(self) -> Recipe:
        return Recipe().replace({"ipc": self.ipc} | self.changes)


# The reference steps AdamW at 1e-3 once per class over all images, so an image sees its own gradient g once
# in C steps: Adam's first moment averages g / C, its second g^2 / C, and C steps move it by about sqrt(C)
# times 1e-3. One step for all classes takes that as its learning rate.
_TEN, _HUNDRED, _TWO_HUNDRED = 3.2e-3, 9.8e-3, 1.4e-2

_SMALL_IMAGES = {"distill.frequencies": 4096}
_TINY = _SMALL_IMAGES | {
    "network.depth": 4,
    "distill.learning_rate": _TWO_HUNDRED,
    "evaluate.epochs": 300,
}
_IMAGENET = _SMALL_IMAGES | {"network.depth": 5, "distill.learning_rate": _TEN}
_NO_FLIP = {"evaluate.augment": DSA_OF_DIGITS}
_SUBSETS = ("nette", "woof", "fruit", "meow", "squawk", "yellow")
_SMALL = {
    "network.width": 32,
    "pretrain.networks": 4,
    "pretrain.epochs": 8,
    "pretrain.learning_rate": 0.05,
    "pretrain.cutmix": 0.0,
    "distill.real_batch": 128,
    "distill.frequencies": 256,
    "distill.learning_rate": 0.02,
    "distill.schedule": "cosine",
    "distill.checkpoint_every": 50,
    "evaluate.labels": ("hard",),
    "evaluate.repeats": 3,
    "evaluate.full_epochs": 8,
    "evaluate.full_repeats": 1,
}
_STEPS = {
    1: {"distill.iterations": 300, "evaluate.epochs": 500},
    10: {"distill.iterations": 150, "evaluate.epochs": 100},
}

PRESETS: dict[str, Preset] = {
    "digits": Preset(
        "digits",
        10,
        _NO_FLIP
        | {
            "network.width": 32,
            "network.depth": 2,
            "pretrain.networks": 5,
            "pretrain.epochs": 30,
            "distill.iterations": 400,
            "distill.frequencies": 256,
            "distill.factor": 1,  # a tile of 4x4 pixels holds no digit
            "distill.learning_rate": 0.02,
            "distill.schedule": "cosine",
            "distill.augment": "color_crop|scale|rotate",
            "distill.checkpoint_every": 100,
            "evaluate.epochs": 400,
            "evaluate.repeats": 5,
            "evaluate.full_epochs": 40,
            "evaluate.full_repeats": 3,
        },
    ),
    "cpu": Preset(
        "cifar10",
        10,
        {
            "network.width": 32,
            "pretrain.networks": 2,
            "pretrain.epochs": 2,
            "pretrain.learning_rate": 0.05,
            "pretrain.cutmix": 0.0,
            "distill.iterations": 200,
            "distill.real_batch": 64,
            "distill.learning_rate": 0.02,
            "distill.schedule": "cosine",
            "distill.checkpoint_every": 50,
            "evaluate.epochs": 60,
            "evaluate.repeats": 3,
            "evaluate.labels": ("hard",),
            "evaluate.full_epochs": 2,
            "evaluate.full_repeats": 1,
        },
    ),
    # The campaign of tools/reproduce.py at a size for CPUs.
    **{
        f"cifar10-small-ipc{ipc}": Preset("cifar10", ipc, _SMALL | changes) for ipc, changes in _STEPS.items()
    },
    "cifar100-small-ipc1": Preset("cifar100", 1, _SMALL | _STEPS[1]),
    # No result is published for these three; they have the settings of CIFAR-10.
    "mnist": Preset("mnist", 10, _SMALL_IMAGES | {"distill.learning_rate": _TEN} | _NO_FLIP),
    "fashion_mnist": Preset("fashion_mnist", 10, _SMALL_IMAGES | {"distill.learning_rate": _TEN}),
    "svhn": Preset("svhn", 10, _SMALL_IMAGES | {"distill.learning_rate": _TEN} | _NO_FLIP),
    **{
        f"cifar10-ipc{ipc}": Preset("cifar10", ipc, _SMALL_IMAGES | {"distill.learning_rate": _TEN})
        for ipc in (1, 10, 50)
    },
    **{
        f"cifar100-ipc{ipc}": Preset("cifar100", ipc, _SMALL_IMAGES | {"distill.learning_rate": _HUNDRED})
        for ipc in (1, 10, 50)
    },
    **{f"tinyimagenet-ipc{ipc}": Preset("folder", ipc, _TINY, size=64) for ipc in (1, 10, 50)},
    **{
        f"image{name}-ipc{ipc}": Preset("folder", ipc, _IMAGENET, size=128)
        for name in _SUBSETS
        for ipc in (1, 10)
    },
}


def find_preset(name: str | None, dataset: str, ipc: int | None) -> tuple[str, Preset]:
    """The named row, or else the one for this dataset and IPC, or else the one for this dataset.

    A dataset without a row gets the defaults under the name "default". Raises `UnknownNameError`.
    """
    if name is not None:
        if name not in PRESETS:
            raise UnknownNameError.of("preset", name, PRESETS)
        return name, PRESETS[name]
    for candidate in (f"{dataset}-ipc{ipc}", dataset, f"{dataset}-ipc10"):
        if candidate in PRESETS:
            return candidate, PRESETS[candidate]
    return "default", Preset(dataset, 10)
