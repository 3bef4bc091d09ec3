"""Search spaces: from what an architecture is chosen, as plain data."""

import hashlib
import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distilled_data import UnknownNameError, UsageError
from distilled_data.randomness import generator_at

from .networks import ACTIVATIONS, NORMS, POOLINGS, build_network, initial_weights, resnet

__all__ = ["SPACES", "Architecture", "Space", "load_space"]

Choice = str | int | float | bool
Architecture = Mapping[str, Choice]  # one value of every axis


@dataclass(frozen=True)
class Space:
    """All combinations of the values of `axes`.

    `build(channels=, size=(height, width), classes=, **architecture)` returns a new module that makes logits
    [N, classes] of images [N, channels, height, width].
    """

    axes: Mapping[str, Sequence[Choice]]
    build: Callable[..., nn.Module]

    def __post_init__(self):
        if not self.axes:
            raise UsageError("a space needs one axis at least; one architecture needs no search")
        for name, values in self.axes.items():
            kinds = {type(value) for value in values}
            if isinstance(values, str) or not values or not kinds <= {str, int, float, bool}:
                raise UsageError(f"axis {name}: expected texts, numbers or truth values, got {values!r}")
            if len(set(values)) < len(values):
                raise UsageError(f"axis {name} has a value twice: {values!r}")

    def __len__(self) -> int:
        """Number of architectures."""
        count = 1
        for values in self.axes.values():
            count *= len(values)
        return count

    def __iter__(self) -> Iterator[Architecture]:
        """Every architecture, the last axis changing fastest."""
        for values in itertools.product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))

    def draw(self, count: int | None = None, seed: int = 0) -> list[Architecture]:
        """`count` different architectures (all, if there are no more, or None), in random order."""
        every = list(self)
        order = torch.randperm(len(every), generator=generator_at(seed, "architectures"))
        return [every[index] for index in order[:count]]

    @property
    def code(self) -> str:
        """What `build` is: its name, and a hash of the module that a user wrote it in."""
        function = f"{self.build.__module__}.{self.build.__qualname__}"
        if self.build.__module__ == __name__:
            return function
        text = inspect.getsource(sys.modules[self.build.__module__])
        return f"{function} {hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def with_axes(self, changes: Mapping[str, str]) -> "Space":
        """This space with other values, separated by commas, on some axes. Texts must be among those there.

        Raises `UnknownNameError`, and `UsageError` for a value of another type.
        """
        axes = dict(self.axes)
        for name, text in changes.items():
            if name not in axes:
                raise UnknownNameError.of("axis", name, axes)
            axes[name] = tuple(_value(name, word.strip(), axes[name]) for word in text.split(","))
        return Space(axes, self.build)

    def network(
        self, architecture: Architecture, *, channels: int, size: tuple[int, int], classes: int, seed: int
    ) -> nn.Module:
        """A network on the CPU, with the initial weights that `seed` gives."""
        with initial_weights(seed):
            return self.build(channels=channels, size=size, classes=classes, **architecture)


def _value(axis: str, word: str, known: Sequence[Choice]) -> Choice:
    """`word` as the type of the values that the axis has."""
    kind = type(known[0])
    if kind is str and word not in known:
        raise UnknownNameError.of(axis, word, map(str, known))
    try:
        return {"true": True, "false": False}[word.lower()] if kind is bool else kind(word)
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"axis {axis}: expected {kind.__name__}, such as {known[0]!r}, got {word!r}"
        ) from error


def _convnet(**options: Any) -> nn.Module:
    return build_network("convnet", seed=torch.initial_seed(), **options)


def _resnet(channels: int, size: tuple[int, int], classes: int, norm: str, **shape: int) -> nn.Module:
    return resnet(channels, size, classes, NORMS[norm], **shape)


SPACES: Mapping[str, Space] = {
    # The 720 of dataset condensation (Zhao, Mopuri and Bilen 2021, arXiv 2006.05929, section 4.2).
    "convnet": Space(
        {
            "width": (32, 64, 128, 256),
            "depth": (1, 2, 3, 4),
            "norm": tuple(NORMS),
            "activation": tuple(ACTIVATIONS),
            "pooling": tuple(POOLINGS),
        },
        _convnet,
    ),
    "resnet": Space(
        {
            "width": (16, 32, 64),
            "stages": (2, 3, 4),
            "blocks": (1, 2, 3),
            "norm": ("batch", "layer", "instance", "group"),
        },
        _resnet,
    ),
}


def load_space(name: str) -> Space:
    """The space of this name, or what "module:function" returns; the module is looked for here too.

    Raises `UnknownNameError`, and `UsageError` for a function that cannot be had or returns something else.
    """
    if name in SPACES:
        return SPACES[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise UnknownNameError.of("space", name, [*SPACES, "module:function"])
    sys.path.insert(0, "")  # the folder in which the command was called
    try:
        space = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"the space {name} cannot be had: {error}") from error
    finally:
        sys.path.remove("")
    if not isinstance(space, Space):
        raise UsageError(f"{name} must return a Space of ncfm_engine.spaces, got {type(space).__name__}")
    return space
