"""What a saved set was made by and of, found again: its recipe, its real images, its teacher."""

import warnings
from collections.abc import Sequence
from typing import Any

from distilled_data import DistilledDataset, SourceError, UsageError
from distilled_data.interchange import by_numbers

from .config import PretrainConfig, Recipe
from .pool import FeaturePool
from .presets import find_preset
from .pretrain import pretrain
from .sources import CHANGES, PLACES, SOURCES, Source, hold_out, load_source


def recipe_of(distilled: DistilledDataset, dataset: str | None = None) -> Recipe:
    """The recipe that a set was made by; of another project's, the one that we would make its like by: of
    `dataset` if that is the name of one, else of what the set itself is called.
    """
    info = distilled.info
    if not is_foreign(distilled):
        return Recipe.from_dict(info.recipe["settings"])
    labels = ["hard"] if distilled.artifact.logits is None else ["hard", "soft"]
    known = {"ipc": info.ipc, "distill.factor": info.factor, "evaluate.labels": labels}
    name = dataset if dataset and ":" not in dataset else info.dataset
    return find_preset(None, name, info.ipc)[1].recipe().replace(known)


def is_foreign(distilled: DistilledDataset) -> bool:
    """Whether a set is another project's: it does not record by what recipe it was made."""
    return "settings" not in distilled.info.recipe


def named(dataset: DistilledDataset) -> str:
    """What a set is called in messages: where it lies, or what it is of."""
    return str(dataset.folder or f"the set of {dataset.info.dataset}")


def real_images(
    distilled: DistilledDataset, dataset: str | None, reading: dict[str, Any] | None, **options: Any
) -> tuple[Source, Source]:
    """The real data of a set, read as it was then: all of it, and as the set saw it, which may be without a
    validation split that takes the place of the test set.

    `dataset` names it where the set's own name is not enough (folder:PATH), `reading` are keywords of
    `load_source`, `options` stop and report. Raises `UsageError` where it has to be named, `SourceError` for
    what the set was not distilled from, and for a set of some of its classes.
    """
    info, name, recipe = distilled.info, named(distilled), recipe_of(distilled)
    if not {"id", "fingerprint"} <= set(info.source):
        real = _said_to_be_of(distilled, dataset, reading, **options)
        return real, real
    kind = str(info.source["id"]).partition(":")[0]
    if dataset is None and (kind in PLACES or info.dataset not in SOURCES or info.dataset in PLACES):
        # An artifact, which may come from anybody, must not say which place is read.
        raise UsageError(
            f"{name} was distilled from {info.source['id']}; name it with --dataset "
            f"{kind}:{PLACES.get(kind, 'PLACE')}"
        )
    recorded = info.source.get("reading")
    if not isinstance(recorded, dict) or (dataset or "").startswith("store:"):
        recorded = {}
    known = {name: recorded[name] for name in CHANGES if name in recorded}
    if "size" not in known:  # where it did nothing it was recorded too
        known.pop("fit", None)
    real = load_source(dataset or info.dataset, **(known | (reading or {})), **options)
    source = hold_out(real, recipe.validation) if recipe.validation else real
    if source.fingerprint != info.source["fingerprint"]:
        asked = {name: value for name, value in (reading or {}).items() if name in CHANGES}
        differing = [name for name, value in asked.items() if value != known.get(name)]
        others = [f"--{name} {known[name]}" if name in known else f"no --{name}" for name in differing]
        raise SourceError(
            f"{dataset or info.dataset} is not the data that {name} was distilled from: expected "
            f"fingerprint {info.source['fingerprint']}, got {source.fingerprint}."
            + (f" It was read with {', '.join(others)}." if others else "")
        )
    _check_classes(info.classes, real.classes, name, dataset or info.dataset, "Take the set of all of them.")
    return real, source


def _said_to_be_of(
    distilled: DistilledDataset, dataset: str | None, reading: dict[str, Any] | None, **options: Any
) -> Source:
    """The real data of another project's set, which does not record it."""
    info, name = distilled.info, named(distilled)
    if dataset is None:
        raise UsageError(
            f"{name} does not record what it was distilled from; name the real images with --dataset: "
            f"{', '.join(name for name in SOURCES if name not in PLACES)}, folder:PATH ..."
        )
    real = load_source(dataset, **(reading or {}), **options)
    expected = [len(info.classes), info.channels, info.height, info.width]
    found = [real.num_classes, real.channels, real.height, real.width]
    if found != expected:
        raise SourceError(
            f"{dataset} is not the data that {name} was distilled from: expected classes, channels, height "
            f"and width {expected}, got {found}."
            + (f" Resize them: --size {info.height}." if found[:2] == expected[:2] else "")
        )
    _check_classes(info.classes, real.classes, name, dataset, "Convert it with --classes.")
    ours = info.classes
    if ours != real.classes and ours == tuple(sorted(ours)) != by_numbers(ours):
        raise SourceError(
            f"the classes of {name} have the order of their names, {', '.join(ours[:10])}, and not of the "
            f"numbers in them, as those of {dataset} would. Write all numbers with as many digits, and "
            "convert it again."
        )
    return real


def _check_classes(ours: Sequence[str], theirs: Sequence[str], name: str, dataset: str, advice: str) -> None:
    """Their numbers must mean the same; names that are all others are taken for the same classes."""
    if len(ours) != len(theirs) or (ours != theirs and set(ours) & set(theirs)):
        raise SourceError(
            f"the classes of {name} are others, or in another order, than those of {dataset}: expected "
            f"{', '.join(ours[:10])}, got {', '.join(theirs[:10])}. {advice}"
        )


def teacher_pool(
    distilled: DistilledDataset,
    source: Source,
    *,
    dataset: str | None = None,
    config: PretrainConfig | None = None,
    device: str,
    **options: Any,
) -> FeaturePool:
    """The networks that labelled a set, from the cache or trained anew by its recipe, see `recipe_of`; those
    that take their place beside another project's set may be trained by another `config`.
    """
    original = recipe_of(distilled, dataset)
    config, foreign = config or original.pretrain, is_foreign(distilled)
    recorded = distilled.info.labels.get("teacher", {}).get("weights_sha256")
    if foreign:  # said before they are trained, which may take hours
        warnings.warn(
            f"the networks that labelled {named(distilled)} are not known; the random images get the labels "
            f"of {config.networks} of our own, trained for {config.epochs} epochs, or "
            "found in the cache. Hard labels need none, nor does an evaluation without random images",
            stacklevel=2,
        )
    pool = pretrain(config, original.network, source, seed=original.seed, device=device, **options)
    if pool.weights_hash != recorded and not foreign:
        warnings.warn(
            f"the teacher of {named(distilled)} was trained elsewhere (weights {recorded}); one of the same "
            f"recipe trained here ({pool.weights_hash}) takes its place, for random images and new labels",
            stacklevel=2,
        )
    return pool
