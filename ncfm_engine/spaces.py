"""Search spaces: from what an architecture is chosen, as plain data."""

import ast
import contextlib
import functools
import hashlib
import importlib
import itertools
import math
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import decode_source, find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.backends import cudnn

from distilled_data import UnknownNameError, UsageError
from distilled_data.randomness import generator_at, seeded_with

from .networks import ACTIVATIONS, NORMS, POOLINGS, build_network, resnet

__all__ = ["SPACES", "Architecture", "Space", "load_space"]

LIBRARIES = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]

LISTED = 1_000_000  # architectures, of which all are listed to draw from
CPU = torch.device("cpu")


def _set_device(device: torch.device) -> None:
    """None is the CPU, too, but every call of torch takes longer where that was set."""
    torch.set_default_device(None if device == CPU else device)


# Of the process: how each is read, and set.
SETTINGS: Sequence[tuple[Callable[[], Any], Callable[[Any], object]]] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (lambda: cudnn.benchmark, functools.partial(setattr, cudnn, "benchmark")),
    (lambda: cudnn.allow_tf32, functools.partial(setattr, cudnn, "allow_tf32")),
    (lambda: cudnn.deterministic, functools.partial(setattr, cudnn, "deterministic")),
    (torch.get_num_threads, torch.set_num_threads),
    (os.getcwd, os.chdir),
)

GIVEN = ("channels", "size", "classes")  # arguments of `build` besides the axes

TO_NAMES = "Give names to what is none of these, and let build look them up."
TO_PYTHON = "They have to be Python's own: .tolist() makes them, of arrays and of single values."

Choice = str | int | float | bool
Architecture = Mapping[str, Choice]  # one value of every axis


def name_of(architecture: Architecture) -> str:
    """What an architecture is called in messages, e.g. "width=4 depth=2"."""
    return " ".join(f"{name}={value}" for name, value in architecture.items())


@dataclass(frozen=True)
class Space:
    """All combinations of the values of `axes`.

    `build(channels=, size=(height, width), classes=, **architecture)` returns a new module that makes logits
    [N, classes] of images [N, channels, height, width]. Raises `UsageError` for axes or a
    `build` of no use.
    """

    axes: Mapping[str, Sequence[Choice]]
    build: Callable[..., nn.Module]
    name: str = ""  # module:function that it was loaded from

    def __post_init__(self):
        if not self.axes:
            raise UsageError("a space needs one axis at least; one architecture needs no search")
        if not callable(self.build):
            raise UsageError(f"build must be a function that returns a module, got {self.build!r}")
        for name, values in self.axes.items():
            if not isinstance(name, str):
                raise UsageError(f"the name of an axis is an argument of build, a text; got {name!r}")
            if name in GIVEN:
                raise UsageError(f"no axis can be called {name}: build gets those of the images by it")
            ordered = isinstance(values, Sequence) and not isinstance(values, str)
            kinds = {type(value) for value in values} if ordered else set()
            if not ordered or len(values) == 0 or not kinds <= {str, int, float, bool}:
                numpy = any(hasattr(value, "tolist") for value in [values, *(values if ordered else [])])
                raise UsageError(
                    f"axis {name}: expected texts, numbers or truth values, in an order, got {values!r}. "
                    + (TO_PYTHON if numpy else TO_NAMES)
                )
            if not all(math.isfinite(value) for value in values if isinstance(value, float)):
                raise UsageError(f"axis {name} has a value that is not finite: {values!r}")
            if len(set(values)) < len(values):
                raise UsageError(f"axis {name} has a value twice: {values!r}")

    def __len__(self) -> int:
        """Number of architectures."""
        return math.prod(map(len, self.axes.values()))

    def __iter__(self) -> Iterator[Architecture]:
        """Every architecture, the last axis changing fastest."""
        for values in itertools.product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))

    def draw(self, count: int | None = None, seed: int = 0) -> list[Architecture]:
        """`count` different architectures (all, if there are no more, or None), in random order.

        Raises `UsageError` where all are too many to list, and for a negative `count`.
        """
        if count is not None and count < 0:
            raise UsageError(f"count must be 0 or more, got {count}")
        generator = generator_at(seed, "architectures")
        size = math.prod(map(len, self.axes.values()))  # `len` of a space has to fit into 64 bits
        if size <= LISTED:
            every = list(self)
            return [every[index] for index in torch.randperm(len(every), generator=generator)[:count]]
        if count is None or count > LISTED:
            raise UsageError(
                f"the space has {size:,} architectures; draw some: --candidates, up to {LISTED:,}"
            )
        drawn: dict[tuple[int, ...], None] = {}  # in the order of the draws
        while len(drawn) < count:
            places = (int(torch.randint(len(v), (), generator=generator)) for v in self.axes.values())
            drawn[tuple(places)] = None
        return [
            {name: values[place] for (name, values), place in zip(self.axes.items(), places, strict=True)}
            for places in drawn
        ]

    @functools.cached_property  # before anything is built, which may import more
    def code(self) -> str:
        """What makes the networks: the name that the space was loaded by, or `build` and what it binds, and a
        hash of the modules of the user's that are behind it.
        """
        build, bound = self.build, []
        while isinstance(build, functools.partial):
            bound.append(repr((build.args, build.keywords)))
            build = build.func
        function = getattr(build, "__qualname__", type(build).__qualname__)
        name = self.name or " ".join([f"{build.__module__}.{function}", *bound])
        modules = {build.__module__, self.name.partition(":")[0]}
        text = "".join(source for module in sorted(modules) for source in _sources(module))
        return f"{name} {hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def own_code(self) -> str | None:
        """`code` where it is the user's: None for networks of this project, which no edit of his changes."""
        return None if self.build in [space.build for space in SPACES.values()] else self.code

    def with_axes(self, changes: Mapping[str, str]) -> "Space":
        """This space with other values, separated by commas, on some axes. Texts must be among those there.

        Raises `UnknownNameError`, and `UsageError` for a value of another type.
        """
        axes = dict(self.axes)
        for name, text in changes.items():
            if name not in axes:
                raise UnknownNameError.of("axis", name, axes)
            axes[name] = tuple(_value(name, word.strip(), axes[name]) for word in text.split(","))
        return replace(self, axes=axes)

    def network(
        self, architecture: Architecture, *, channels: int, size: tuple[int, int], classes: int, seed: int
    ) -> nn.Module:
        """A network on the CPU, with the initial weights that `seed` gives. Raises `UsageError` for one that
        has been trained and for what is no network, and whatever `build` raises.
        """
        with settings_kept(), seeded_with(seed):
            network = self.build(channels=channels, size=size, classes=classes, **architecture)
        if not isinstance(network, nn.Module):
            raise UsageError(f"build must return a torch.nn.Module, got {type(network).__name__}")
        if any(weights.grad is not None for weights in network.parameters()):
            raise UsageError(
                f"build returned a network that has gradients for {dict(architecture)}, as after a training; "
                "expected a new one, and zero_grad() if its making left any"
            )
        return network


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """What a network sets for the whole process is its own: others that are trained here later would fail by
    it, or be trained otherwise than elsewhere.
    """
    before = [_known(get) for get, _ in SETTINGS]
    try:
        yield
    finally:
        for (get, put), value in zip(SETTINGS, before, strict=True):
            if value == CPU or value not in (None, _known(get)):  # it may have been set to what it was
                with contextlib.suppress(FileNotFoundError):
                    put(value)


def _known(get: Callable[[], Any]) -> Any:
    # of a folder that was deleted; of a precision that was set by an interface which `get` is too old for
    with contextlib.suppress(FileNotFoundError, RuntimeError):
        return get()


def _sources(name: str) -> Iterator[str]:
    """The text of a module and of all that it imports or has names from, but for installed packages."""
    first, found, left = name, dict[Path, str](), [name]
    while left:
        name = left.pop()
        top = _file(name.partition(".")[0])
        installed = name.partition(".")[0] == __package__ or any(map(top.is_relative_to, LIBRARIES))
        if installed and name != first:  # nor is a part of it looked for, which would import it
            continue
        path = _file(name)
        if path.suffix != ".py" or path in found:
            continue
        found[path] = decode_source(path.read_bytes())
        left += _imported(found[path], name if path.stem == "__init__" else name.rpartition(".")[0])
        for value in vars(sys.modules[name]).values() if name in sys.modules else ():
            of = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            left += [of] if isinstance(of, str) else []
    return (found[path] for path in sorted(found))


def _file(name: str) -> Path:
    """Of a module, imported or not; of one that has none, or is not there, an empty path."""
    try:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None) if module else getattr(find_spec(name), "origin", None)
    except Exception:  # a part of what is no package, or whatever the package of a user's raises
        file = None
    return Path(file or "")


def _imported(text: str, package: str) -> Iterator[str]:
    """Names that the import statements of a module of `package` may mean modules by, in functions too."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # which its import will tell
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def _value(axis: str, word: str, known: Sequence[Choice]) -> Choice:
    """`word` as the type of the values that the axis has."""
    for value in known:  # they may be of several types
        if str(value) == word:
            return value
    kind = type(known[0])
    if kind is str:
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
    if module.endswith(".py") or "/" in module or os.sep in module:
        raise UsageError(
            f"the space {name}: expected a module as an import statement names it, got a path. From the "
            f"folder that it is in: {Path(module).name.removesuffix('.py')}:{function}"
        )
    sys.path.insert(0, "")  # the folder in which the command was called
    try:
        make = getattr(importlib.import_module(module), function)
        with seeded_with(0):  # a network that it makes to be copied has the same weights everywhere
            space = make()
    except (Exception, SystemExit) as error:  # whatever a user's code raises
        reason = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"the space {name} cannot be had: {reason}") from error
    finally:
        sys.path.remove("")
    if "" not in sys.path:  # for what `build` imports when it is called
        sys.path.append("")
    if not isinstance(space, Space):
        raise UsageError(f"{name} must return a Space of ncfm_engine.spaces, got {type(space).__name__}")
    return replace(space, name=name)
