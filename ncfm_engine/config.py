"""The recipe of a run: small frozen dataclasses, every field with its unit, senseless values refused."""

import dataclasses
import functools
import math
import sys
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from distilled_data import UnknownNameError, UsageError
from distilled_data.augment import parse
from distilled_data.format import MAX_FACTOR

from .networks import ACTIVATIONS, GROUPS, NETWORKS, NORMS, POOLINGS

LABELS = ("hard", "soft", "teacher")
PRECISIONS = ("float32", "bfloat16")
DISCREPANCIES = ("ncfd", "cfd", "mmd", "dm", "mse")
INITIALISATIONS = ("real", "herding", "clusters", "noise")


class _Config:
    """Refuses values of another type than the field's, and numbers that are not finite.

    A whole number in place of a fraction becomes one: what is equal has the same hash of its JSON, too.
    """

    def __post_init__(self):
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            fits = isinstance(value, (int, float) if kind is float else typing.get_origin(kind) or kind)
            fits = fits and (kind is bool or not isinstance(value, bool))
            fits = fits and (kind is not float or abs(value) <= sys.float_info.max)  # which NaN is not
            self._require(fits, name, f"must be {getattr(kind, '__name__', kind)}")
            if kind is float:
                object.__setattr__(self, name, float(value))

    def _require(self, condition: bool, name: str, rule: str) -> None:
        if not condition:
            raise UsageError(f"{type(self).__name__}.{name} {rule}, got {getattr(self, name)!r}")

    def _within(self, low: float, high: float, *names: str) -> None:
        for name in names:
            rule = f"must be {low:g} or more" if high == math.inf else f"must lie in {low:g}..{high:g}"
            self._require(low <= getattr(self, name) <= high, name, rule)

    def _known(self, kind: str, name: str, known: Iterable[str]) -> None:
        if getattr(self, name) not in known:
            raise UnknownNameError.of(kind, getattr(self, name), known)


@dataclass(frozen=True)
class NetworkConfig(_Config):
    """An architecture of `ncfm_engine.networks`; width, depth, activation and pooling are for convnet."""

    name: str = "convnet"
    width: int = 128  # channels of every block
    depth: int = 3  # blocks; each halves the image
    norm: str = "instance"
    activation: str = "relu"
    pooling: str = "avg"

    def __post_init__(self):
        super().__post_init__()
        self._known("network", "name", NETWORKS)
        self._known("norm", "norm", NORMS)
        self._known("activation", "activation", ACTIVATIONS)
        self._known("pooling", "pooling", POOLINGS)
        self._within(1, math.inf, "width", "depth")
        grouped = self.name == "convnet" and self.norm == "group"
        fits = not grouped or self.width % GROUPS == 0
        self._require(fits, "width", f"must be a multiple of {GROUPS}, the groups of norm group")


@dataclass(frozen=True)
class PretrainConfig(_Config):
    """The pool of feature networks, each kept at initialisation, along its training and after it."""

    networks: int = 20
    epochs: int = 60  # passes over the real training set
    learning_rate: float = 0.01  # SGD, x 0.2 at two thirds and five sixths
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    augment: str = "color_crop"
    cutmix: float = 0.5  # probability per batch
    snapshots: int = 0  # weights kept per network on the way, evenly spaced in epochs
    precision: str = "float32"  # of the networks; or "bfloat16" where the device is faster so
    at_once: int = 0  # networks trained together; 0: as many as a GPU has room for, on a CPU one

    def __post_init__(self):
        super().__post_init__()
        parse(self.augment)
        self._within(1, math.inf, "networks", "epochs", "batch_size")
        self._within(0, math.inf, "learning_rate", "weight_decay")
        self._within(0, 1, "cutmix")
        self._known("precision", "precision", PRECISIONS)
        self._within(0, math.inf, "snapshots", "at_once")
        self._require(self.snapshots < self.epochs, "snapshots", f"must be below epochs ({self.epochs})")
        self._require(0 <= self.momentum < 1, "momentum", "must be 0 or more and below 1")


@dataclass(frozen=True)
class DistillConfig(_Config):
    """The matching game."""

    iterations: int = 20_000
    discrepancy: str = "ncfd"  # psi plays; "cfd": normal frequencies; "mmd", "dm", "mse": its relatives
    real_batch: int = 1024  # real images per class and step; at most the largest class
    real_features: str = "bank"  # made once, used by several steps; or "fresh": made for every step
    bank_size: int = 8  # entries alive, each one blended network and its features of a real batch
    bank_refresh: int = 10  # steps after which the oldest entry is replaced
    frequencies: int = 1024  # T
    alpha: float = 0.5  # weight of amplitude against phase, 0..1
    weight: float = 300.0  # of the discrepancy, per class
    calibration: float = 1.0  # weight of the cross-entropy under a trained network, per class
    factor: int = 2  # each packed image holds factor x factor tiles
    initialisation: str = "real"  # random real images; typical ones by "herding", "clusters"; or "noise"
    nested: bool = False  # images[:k] is matched too, with another k at every step: prefixes are good sets
    quantised: float = 0.0  # share of the steps, the last ones, that see the images rounded to bytes
    ema: float = 0.0  # decay per step of the images' moving average, which is then the result
    learning_rate: float = 0.01  # AdamW on pixels in [0, 1]
    schedule: str = "constant"  # of that rate; or "cosine", down to zero
    sampler_learning_rate: float = 1e-3  # SGD ascent on psi
    sampler_momentum: float = 0.5
    sampler_steps: int = 1  # of psi for each step of the images
    augment: str = "color_crop_cutout"
    augment_shared: bool = True  # one draw per step for real and synthetic images alike, or one per image
    precision: str = "float32"  # of the networks; or "bfloat16" where the device is faster so
    checkpoint_every: int = 500  # steps

    def __post_init__(self):
        super().__post_init__()
        parse(self.augment)
        self._known("discrepancy", "discrepancy", DISCREPANCIES)
        self._known("real features", "real_features", ("fresh", "bank"))
        self._known("schedule", "schedule", ("constant", "cosine"))
        self._known("initialisation", "initialisation", INITIALISATIONS)
        self._known("precision", "precision", PRECISIONS)
        self._within(1, math.inf, "real_batch", "frequencies", "checkpoint_every")
        self._within(1, MAX_FACTOR, "factor")
        self._within(1, math.inf, "bank_size", "bank_refresh", "sampler_steps")
        self._within(0, math.inf, "iterations", "weight", "calibration")
        self._within(0, math.inf, "learning_rate", "sampler_learning_rate")
        self._within(0, 1, "alpha", "quantised")
        self._require(0 <= self.ema < 1, "ema", "must be 0 or more and below 1")
        self._require(0 <= self.sampler_momentum < 1, "sampler_momentum", "must be 0 or more and below 1")

    @property
    def has_frequencies(self) -> bool:
        """Whether the discrepancy compares characteristic functions."""
        return self.discrepancy in ("ncfd", "cfd")

    @property
    def turns(self) -> int:
        """How often a step looks at the images: but for the last time, only psi learns from it."""
        return self.sampler_steps if self.discrepancy == "ncfd" else 1

    @property
    def kept_entries(self) -> int:
        """Real features that are kept: the bank's, or the step's for all turns."""
        return self.bank_size if self.real_features == "bank" else int(self.turns > 1)


@dataclass(frozen=True)
class LabelConfig(_Config):
    """Soft labels: logits of the trained pool, averaged."""

    temperature: float = 4.0  # of the softmax that the set is used with; chosen on CIFAR-10, 10 per class

    def __post_init__(self):
        super().__post_init__()
        self._within(1e-3, math.inf, "temperature")  # of less, float32 makes no probabilities


@dataclass(frozen=True)
class EvaluateConfig(_Config):
    """Protocol "ncfm": fresh networks trained on the artifact, AdamW halved at each fifth."""

    epochs: int = 2000  # passes over the decoded distilled images; the random subset gets as many steps
    learning_rate: float = 1e-3
    weight_decay: float = 0.01  # AdamW's own default
    batch_size: int = 128
    augment: str = "flip_color_crop|scale|rotate"
    cutmix: float = 0.5  # probability per batch
    repeats: int = 10  # fresh networks, each with a seed of its own
    labels: tuple[str, ...] = ("hard", "soft")  # or "teacher": what it says of every batch, augmented
    full_epochs: int = 60  # passes over the full training set for the upper bound
    full_repeats: int = 3
    precision: str = "float32"  # of the networks; or "bfloat16" where the device is faster so
    at_once: int = 0  # networks trained together; 0: as many as a GPU has room for, on a CPU one

    def __post_init__(self):
        super().__post_init__()
        parse(self.augment)
        self._within(1, math.inf, "epochs", "batch_size", "repeats", "full_epochs")
        self._within(0, math.inf, "learning_rate", "weight_decay", "full_repeats", "at_once")
        self._known("precision", "precision", PRECISIONS)
        self._within(0, 1, "cutmix")
        for name in self.labels:
            if name not in LABELS:
                raise UnknownNameError.of("label kind", str(name), LABELS)
        different = 0 < len(set(self.labels)) == len(self.labels)
        self._require(different, "labels", f"must be one or more different ones of {', '.join(LABELS)}")

    @property
    def augmented(self) -> bool:
        """Whether networks are trained on anything but the images themselves."""
        return self.augment != "none" or self.cutmix > 0


@dataclass(frozen=True)
class Recipe(_Config):
    """Everything that decides the result, besides the real images themselves.

    It and its parts raise `UsageError` for a value that makes no sense or is of another type.
    """

    ipc: int = 10  # packed images per class
    seed: int = 0
    validation: float = 0.0  # share of train that takes the place of the test set, to choose settings by
    network: NetworkConfig = field(default_factory=NetworkConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self):
        super().__post_init__()
        self._within(1, math.inf, "ipc")
        self._require(-(2**63) <= self.seed < 2**63, "seed", "must have 64 bits or fewer")
        self._require(0 <= self.validation < 1, "validation", "must be 0 or more and below 1")

    def replace(self, changes: dict[str, Any]) -> "Recipe":
        """This recipe with dotted fields changed: `{"distill.alpha": 0.3}`.

        Values may be text, as on a command line; they are read by the field's type. Raises
        `UnknownNameError` for another field, and `UsageError`.
        """
        known, sections = _kinds(), dict[str, dict[str, Any]]()
        for path, value in changes.items():  # all of a section at once: in any order they fit together or not
            if path not in known:
                same = [setting for setting in known if setting.endswith(f".{path}")]
                raise UnknownNameError.of("setting", path, known, close=same)
            section, _, name = path.rpartition(".")
            sections.setdefault(section, {})[name] = _convert(path, value, known[path])
        own = sections.pop("", {})
        parts = {name: dataclasses.replace(getattr(self, name), **new) for name, new in sections.items()}
        return dataclasses.replace(self, **own, **parts)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Recipe":
        """The recipe that `asdict` and JSON made of one. Raises as `replace` does."""
        if not isinstance(content, dict):
            raise UsageError(f"the settings of a recipe must be an object, got {content!r:.80}")
        return cls().replace(flatten(content))


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        group = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{name}.") if group else {prefix + name: value}
    return flat


def differences(default: Recipe, chosen: Recipe) -> list[str]:
    """Settings that `chosen` has otherwise than `default`, as "distill.alpha = 0.3"."""
    usual, ours = (flatten(dataclasses.asdict(recipe)) for recipe in (default, chosen))
    return [f"{name} = {value}" for name, value in ours.items() if value != usual[name]]


@functools.cache
def _kinds() -> dict[str, Any]:
    """The type of each setting, by its dotted name."""
    kinds = {}
    for name, kind in typing.get_type_hints(Recipe).items():
        section = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        kinds |= {f"{name}.{inner}": its for inner, its in section.items()} or {name: kind}
    return kinds


def _convert(path: str, value: Any, kind: Any) -> Any:
    """Text, as on a command line, or a list, as in JSON, to the field's type; else `value` itself."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str):
        return value
    if typing.get_origin(kind) is tuple:
        return tuple(word.strip() for word in value.split(","))
    words = {"true": True, "1": True, "false": False, "0": False}
    try:
        return words[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError) as error:
        expected = "true or false" if kind is bool else kind.__name__
        raise UsageError(f"setting {path}: expected {expected}, got {value!r}") from error
