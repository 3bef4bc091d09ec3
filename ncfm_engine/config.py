"""The recipe of a run: small frozen dataclasses, every field with its unit, senseless values refused."""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from distilled_data import UnknownNameError, UsageError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _at_least(config: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= minimum, f"{type(config).__name__}.{name} must be {minimum} or more, got {value}")


@dataclass(frozen=True)
class NetworkConfig:
    """An architecture of `ncfm_engine.networks`; width, depth, activation and pooling are for convnet."""

    name: str = "convnet"
    width: int = 128  # channels of every block
    depth: int = 3  # blocks; each halves the image
    norm: str = "instance"
    activation: str = "relu"
    pooling: str = "avg"

    def __post_init__(self):
        _at_least(self, 1, "width", "depth")


@dataclass(frozen=True)
class PretrainConfig:
    """The pool of feature networks, each kept at initialisation and after training."""

    networks: int = 20
    epochs: int = 60  # passes over the real training set
    learning_rate: float = 0.01  # SGD, x 0.2 at two thirds and five sixths
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    augment: str = "color_crop"
    cutmix: float = 0.5  # probability per batch

    def __post_init__(self):
        _at_least(self, 1, "networks", "epochs", "batch_size")
        _at_least(self, 0, "learning_rate", "momentum", "weight_decay", "cutmix")


@dataclass(frozen=True)
class DistillConfig:
    """The matching game."""

    iterations: int = 20_000
    real_batch: int = 1024  # real images per class and step; at most the smallest class
    frequencies: int = 1024  # T
    adversarial: bool = True  # frequencies from psi; False: standard normal
    alpha: float = 0.5  # weight of amplitude against phase, 0..1
    weight: float = 300.0  # of the discrepancy, per class
    calibration: float = 1.0  # weight of the cross-entropy under a trained network, per class
    factor: int = 2  # each packed image holds factor x factor tiles
    initialisation: str = "real"  # or "noise"
    learning_rate: float = 0.01  # AdamW on pixels in [0, 1]
    schedule: str = "constant"  # of that rate; or "cosine", down to zero at the last step
    sampler_learning_rate: float = 1e-3  # SGD ascent on psi
    sampler_momentum: float = 0.5
    augment: str = "color_crop_cutout"  # drawn once per step, applied to real and synthetic images alike
    checkpoint_every: int = 500  # steps

    def __post_init__(self):
        _at_least(self, 1, "real_batch", "frequencies", "factor", "checkpoint_every")
        _at_least(self, 0, "iterations", "weight", "calibration", "learning_rate", "sampler_learning_rate")
        _require(0 <= self.alpha <= 1, f"DistillConfig.alpha must lie in 0..1, got {self.alpha}")
        if self.schedule not in ("constant", "cosine"):
            raise UnknownNameError("schedule", self.schedule, ["constant", "cosine"])
        if self.initialisation not in ("real", "noise"):
            raise UnknownNameError("initialisation", self.initialisation, ["real", "noise"])


@dataclass(frozen=True)
class LabelConfig:
    """Soft labels: logits of the trained pool, averaged."""

    temperature: float = 1.0  # of the softmax that the set is used with

    def __post_init__(self):
        _require(self.temperature > 0, f"LabelConfig.temperature must be positive, got {self.temperature}")


@dataclass(frozen=True)
class EvaluateConfig:
    """Protocol "ncfm": fresh networks trained on the artifact, AdamW halved at each fifth."""

    epochs: int = 2000  # passes over the decoded distilled images; the random subset gets as many steps
    learning_rate: float = 1e-3
    batch_size: int = 128
    augment: str = "flip_color_crop|scale|rotate"
    cutmix: float = 0.5  # probability per batch
    repeats: int = 10  # fresh networks, each with a seed of its own
    labels: tuple[str, ...] = ("hard", "soft")
    full_epochs: int = 60  # passes over the full training set for the upper bound
    full_repeats: int = 3

    def __post_init__(self):
        _at_least(self, 1, "epochs", "batch_size", "repeats", "full_epochs")
        _at_least(self, 0, "learning_rate", "cutmix", "full_repeats")
        for name in self.labels:
            if name not in ("hard", "soft"):
                raise UnknownNameError("label kind", name, ["hard", "soft"])


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the real images themselves."""

    ipc: int = 10  # packed images per class
    seed: int = 0
    validation: float = 0.0  # share of train that takes the place of the test set, to choose settings by
    network: NetworkConfig = field(default_factory=NetworkConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self):
        _at_least(self, 1, "ipc")
        _require(0 <= self.validation < 1, f"Recipe.validation must lie in 0..1, got {self.validation}")

    def replace(self, changes: dict[str, Any]) -> "Recipe":
        """This recipe with dotted fields changed: `{"distill.alpha": 0.3}`.

        Values may be text, as on a command line; they are read by the field's type.
        """
        recipe = self
        for path, value in changes.items():
            recipe = _replace(recipe, path, path.split("."), value)
        return recipe

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Recipe":
        """The recipe that `asdict` and JSON made of one. Unknown fields raise `UnknownNameError`."""
        return cls().replace(_flatten(content))


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _replace(config: Any, path: str, names: list[str], value: Any) -> Any:
    types = typing.get_type_hints(type(config))
    name, rest = names[0], names[1:]
    if name not in types or dataclasses.is_dataclass(types[name]) != bool(rest):
        raise UnknownNameError("setting", path, _flatten(dataclasses.asdict(Recipe())))
    new = _replace(getattr(config, name), path, rest, value) if rest else _convert(path, value, types[name])
    return dataclasses.replace(config, **{name: new})


def _convert(path: str, value: Any, kind: Any) -> Any:
    if kind is bool and isinstance(value, str):
        words = {"true": True, "1": True, "false": False, "0": False}
        _require(value.lower() in words, f"--set {path}: expected true or false, got {value!r}")
        return words[value.lower()]
    if typing.get_origin(kind) is tuple:
        return tuple(value.split(",") if isinstance(value, str) else value)
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"setting {path}: expected {kind.__name__}, got {value!r}") from error
