"""What is varied, one row each: the claims of the paper, what it leaves open, nested sets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ncfm_engine.config import Recipe

PRESET = "the preset"


@dataclass(frozen=True)
class Variant:
    """`changes` are settings of the recipe; of the set that is made so, `images` are trained on."""

    changes: Mapping[str, str] = field(default_factory=dict)
    # as they are stored, before they were rounded to bytes, or as many random real ones
    images: Literal["stored", "exact", "random"] = "stored"
    prefix: int | None = None  # only the first images of each class, as many as this; None: all


Study = Mapping[str, Variant]


def _each(label: str, field: str, values: str) -> Study:
    """A variant for each of the values of one field."""
    return {f"{label} {value}": Variant({f"distill.{field}": value}) for value in values.split()}


def _distill(**changes: str) -> Variant:
    return Variant({f"distill.{name}": value for name, value in changes.items()})


def _soft(temperature: int, **options) -> Variant:
    return Variant({"evaluate.labels": "soft", "label.temperature": str(temperature)}, **options)


BASE: Study = {"random real images": Variant(images="random"), PRESET: Variant()}

CLAIMS: Study = {
    "psi at rest (fixed scales)": _distill(sampler_learning_rate="0"),
    "no psi (normal frequencies)": _distill(discrepancy="cfd"),
    "alpha 0 (phase only)": _distill(alpha="0"),
    **_each("alpha", "alpha", "0.1 0.3 0.7 0.9"),
    "alpha 1 (amplitude only)": _distill(alpha="1"),
    **_each("frequencies:", "frequencies", "16 64 256 1024 4096"),
    "no calibration": _distill(calibration="0"),
    **{
        f"{name}, no calibration": _distill(discrepancy=name, calibration="0")
        for name in ("cfd", "mmd", "dm", "mse")
    },
}

RECIPE: Study = {
    "before rounding to bytes": Variant(images="exact"),
    "no steps (the real images it starts from)": _distill(iterations="0"),
    **_each("image learning rate", "learning_rate", "0.005 0.01 0.05 0.1"),
    "schedule: constant": _distill(schedule="constant"),
    "schedule: cosine": _distill(schedule="cosine"),
    **_each("psi learning rate", "sampler_learning_rate", "0.0001 0.01 0.1"),
    **_each("psi steps:", "sampler_steps", "2 5"),
    **_each("calibration weight", "calibration", "0.1 10 100 1000"),
    "calibration weight 10, normal frequencies": _distill(calibration="10", discrepancy="cfd"),
    "calibration weight 10, mmd": _distill(calibration="10", discrepancy="mmd"),
    "calibration weight 10, alpha 0.1": _distill(calibration="10", alpha="0.1"),
    "calibration weight 100, normal frequencies": _distill(calibration="100", discrepancy="cfd"),
    "calibration weight 100, factor 4": _distill(calibration="100", factor="4"),
    **_each("real images per class:", "real_batch", "64 1024"),
    "fresh real features": _distill(real_features="fresh"),
    **_each("bank, entries:", "bank_size", "1 16"),
    **_each("bank, steps to a new entry:", "bank_refresh", "5 20"),
    "4 snapshots on the way of each network": Variant({"pretrain.snapshots": "4"}),
    **_each("factor", "factor", "1 4"),
    **_each("start from", "initialisation", "herding clusters noise"),
    "herding, no steps": _distill(initialisation="herding", iterations="0"),
    "clusters, no steps": _distill(initialisation="clusters", iterations="0"),
    **_each("rounded to bytes in the last share of steps:", "quantised", "0.1 0.5"),
    **_each("average of the images, decay", "ema", "0.9 0.99 0.999"),
    "augmentation drawn for every image": _distill(augment_shared="false"),
    "no augmentation while distilling": _distill(augment="none"),
    **{f"soft labels, temperature {t}": _soft(t) for t in (1, 4)},
    **{f"random real images, soft labels, temperature {t}": _soft(t, images="random") for t in (1, 4)},
}


def nested(ipc: int) -> Study:
    """For each k: a set distilled for it alone, and the first k of a larger one, nested or not."""
    study = {}
    for k in (k for k in (1, 2, 5, 10, 20, 50) if k <= ipc):
        study[f"{k}: alone"] = Variant({"ipc": str(k)})
        study[f"{k}: first of {ipc}, nested"] = Variant({"distill.nested": "true"}, prefix=k)
        study[f"{k}: first of {ipc}"] = Variant(prefix=k)
        study[f"{k}: random real images"] = Variant({"ipc": str(k)}, images="random")
    return study


NAMES = ("claims", "recipe", "nested")


def study(name: str, recipe: Recipe) -> Study:
    """The variants of a study by their names: those that differ from `recipe`, and can act in its steps."""
    if name == "nested":
        return nested(recipe.ipc)
    variants = {**BASE, **{"claims": CLAIMS, "recipe": RECIPE}[name]}
    return {name: variant for name, variant in variants.items() if _tells(variant, recipe)}


def _tells(variant: Variant, recipe: Recipe) -> bool:
    if int(variant.changes.get("pretrain.snapshots", 0)) >= recipe.pretrain.epochs:
        return False
    changed = recipe.replace(dict(variant.changes))
    if variant.changes and changed == recipe:
        return False
    # An average over more than a tenth of the steps would still hold the images it began with.
    ours, given, steps = changed.distill.ema, recipe.distill.ema, recipe.distill.iterations
    return ours == given or ours <= 1 - 10 / max(steps, 1)
