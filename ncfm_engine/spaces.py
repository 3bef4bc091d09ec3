"""Search spaces: from what an architecture is chosen, as plain data."""

import functools
import hashlib
import importlib
import itertools
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from distilled_data import UnknownNameError, UsageError
from distilled_data.randomness import generator_at

from .networks import ACTIVATIONS, NORMS, POOLINGS, build_network, initial_weights, resnet

__all__ = ["SPACES", "Architecture", "Space", "load_space"]

LIBRARIES = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]

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

    @functools.cached_property  # before anything is built, which may import more
    def code(self) -> str:
        """What `build` is: its name, and a hash of the modules of the user's that it is made of."""
        build, bound = self.build, []
        while isinstance(build, functools.partial):
            bound.append(repr((build.args, build.keywords)))
            build = build.func
        name = getattr(build, "__qualname__", type(build).__qualname__)
        function = " ".join([f"{build.__module__}.{name}", *bound])
        if build.__module__ == __name__:
            return function
        text = "".join(_sources(build.__module__))
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


def _sources(name: str) -> Iterator[str]:
    """The text of a module and of all that it has names from, but for those of installed packages."""
    first, found, left = name, set(), [name]
    while left:
        name = left.pop()
        module = sys.modules.get(name)
        path = Path(getattr(module, "__file__", None) or "")
        installed = name.partition(".")[0] == __package__ or any(map(path.is_relative_to, LIBRARIES))
        if path.suffix != ".py" or (installed and name != first) or path in found:
            continue
        found.add(path)
        for value in vars(module).values():
            of = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            left += [of] if isinstance(of, str) else []
    return (path.read_text() for path in sorted(found))


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
    except Exception as error:  # whatever a user's code raises
        reason = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"the space {name} cannot be had: {reason}") from error
    finally:
        sys.path.remove("")
    if "" not in sys.path:  # for what `build` imports when it is called
        sys.path.append("")
    if not isinstance(space, Space):
        raise UsageError(f"{name} must return a Space of ncfm_engine.spaces, got {type(space).__name__}")
    return space
