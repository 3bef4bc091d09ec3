"""One run of a variant: distil with one seed, train one network on the result, test it."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distilled_data import DistilledDataset
from distilled_data.loader import Loader
from distilled_data.randomness import seed_at
from ncfm_engine.cache import sha256_of
from ncfm_engine.config import Recipe, flatten
from ncfm_engine.distill import METRICS_FILE, Distilled, distill
from ncfm_engine.evaluate import epochs_of_as_many_steps, random_subset, train_and_test
from ncfm_engine.label import label
from ncfm_engine.plan import Plan, compiles, identity
from ncfm_engine.pool import FeaturePool
from ncfm_engine.pretrain import pool_key, pretrain
from ncfm_engine.report import Report
from ncfm_engine.sources import Source
from ncfm_engine.stop import Stopped, StopRequest, in_turn

from .findings import curve
from .studies import Variant


@dataclass
class Laboratory:
    """Runs variants of the recipe of `plan`; what was distilled stays in `folder` and is not made twice.

    The pool of feature networks is that of the plan's own seed for all runs, the rest follows the run's.
    """

    plan: Plan
    source: Source
    folder: Path
    stop: StopRequest
    report: Report
    _pools: dict[tuple[str, int], FeaturePool] = field(default_factory=dict)

    def run(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Accuracy in percent, seconds of distilling, curve of the losses. Raises `Stopped`."""
        if self.stop.requested:
            raise Stopped(f"before a run of seed {seed}")
        recipe = self.plan.recipe.replace(dict(variant.changes))
        if variant.images == "random":
            return {"accuracy": self._train(recipe, variant, self._random(recipe, seed), seed)}
        distilled, rows = self._distilled(recipe, seed)
        ipc = variant.prefix or recipe.ipc
        loader = self._loader(recipe, self._dataset(recipe, distilled, ipc), seed)
        if variant.images == "exact":
            loader.images = (distilled.images[:ipc] * 255).flatten(0, 1).to(loader.images.device)
        accuracy = self._train(recipe, variant, loader, seed)
        return {"accuracy": accuracy, "seconds": round(distilled.seconds, 1), "curve": curve(rows)}

    def _distilled(self, recipe: Recipe, seed: int) -> tuple[Distilled, list[dict[str, float]]]:
        plan = dataclasses.replace(self.plan, recipe=recipe.replace({"seed": seed}))
        # A run may be prolonged, so its identity leaves the steps out; the pool is that of another seed.
        key = identity(plan, self.source) | {"distill.iterations": recipe.distill.iterations}
        key["pool"] = self._pool_key(recipe)
        folder = self.folder / sha256_of(key)[:16]
        with in_turn(folder / "lock", self.stop, "distil"):  # another study may want the same set
            distilled = distill(
                recipe.distill,
                self.source,
                self._pool(recipe),
                ipc=recipe.ipc,
                seed=seed,
                device=plan.device,
                folder=folder,
                identity=key,
                resume=True,
                stop=self.stop,
                compile=compiles(plan),
                report=self.report,
            )
            lines = (folder / METRICS_FILE).read_text().splitlines()
            return distilled, [json.loads(line) for line in lines]

    def _pool(self, recipe: Recipe) -> FeaturePool:
        plan, config = self.plan, recipe.pretrain
        key = self._pool_key(recipe), config.networks
        if key not in self._pools:
            self._pools[key] = pretrain(
                config,
                recipe.network,
                self.source,
                seed=plan.recipe.seed,
                device=plan.device,
                cache=plan.cache,
                stop=self.stop,
                report=self.report,
            )
        return self._pools[key]

    def _pool_key(self, recipe: Recipe) -> str:
        seed, device = self.plan.recipe.seed, self.plan.device
        return pool_key(recipe.pretrain, recipe.network, self.source, seed, device)

    def _dataset(self, recipe: Recipe, distilled: Distilled, ipc: int) -> DistilledDataset:
        images, labels, factor = distilled.quantised()[:ipc], recipe.evaluate.labels[0], recipe.distill.factor
        logits = None
        if labels == "soft":
            pool = self._pool(recipe)
            logits = label(images, pool, self.source, factor=factor, device=self.plan.device)
        return DistilledDataset.from_tensors(
            images,
            self.source.classes,
            logits,
            factor=factor,
            mean=self.source.mean,
            std=self.source.std,
            temperature=recipe.label.temperature,
            labels=labels,
        )

    def _random(self, recipe: Recipe, seed: int) -> Loader:
        subset = random_subset(
            self.source,
            ipc=recipe.ipc,
            seed=seed_at(0, seed),
            device=self.plan.device,
            labels=recipe.evaluate.labels[0],
            pool=self._pool(recipe) if recipe.evaluate.labels[0] == "soft" else None,
            temperature=recipe.label.temperature,
        )
        return self._loader(recipe, subset, seed)

    def _loader(self, recipe: Recipe, dataset: DistilledDataset, seed: int) -> Loader:
        config = recipe.evaluate
        return dataset.loader(
            config.batch_size, device=self.plan.device, augment=config.augment, seed=seed_at(0, seed)
        )

    def _train(self, recipe: Recipe, variant: Variant, loader: Loader, seed: int) -> float:
        """In as many steps as the plan's own set gets in `evaluate.epochs`, whatever the size of this one."""
        base = self.plan.recipe
        views = base.ipc * self.source.num_classes * base.distill.factor**2
        batches = math.ceil(views / base.evaluate.batch_size)
        epochs = epochs_of_as_many_steps(base.evaluate.epochs, batches, len(loader))
        config, network = recipe.evaluate, recipe.network
        key = identity(dataclasses.replace(self.plan, recipe=recipe), self.source) | {
            **flatten({"evaluate": dataclasses.asdict(config), "label": dataclasses.asdict(recipe.label)}),
            "iterations": recipe.distill.iterations,
            "images": variant.images,
            "prefix": variant.prefix,
            "run": seed,
            "epochs": epochs,
        }
        name = sha256_of(key)[:16]
        lock = self.plan.cache / "locks" / name
        with in_turn(lock, self.stop, "evaluate"):  # another study may have the same training to do
            accuracy, _ = train_and_test(
                loader,
                epochs,
                self.source,
                config,
                network,
                seed_at(0, seed),
                checks=1,
                path=self.folder / f"training-{name}.safetensors",
                identity=key,
                stop=self.stop,
            )
        return round(accuracy, 2)
