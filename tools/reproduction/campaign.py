"""Making the rows of a table: each in stages that resume, the most telling of all rows first."""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from distilled_data import ArtifactError, DistilledDataset
from distilled_data.files import read_json, write_file, write_files, write_json
from distilled_data.format import ARTIFACT_FILE, FOLDER_FILES
from distilled_data.manifest import verify_folder
from hub import complete_folder
from ncfm_engine.config import Recipe, flatten
from ncfm_engine.costs import COSTS_FILE, Costs
from ncfm_engine.distill import METRICS_FILE
from ncfm_engine.evaluate import forget_progress, settings_hash
from ncfm_engine.pipeline import evaluate_folder, open_source, record_results, run, write_results
from ncfm_engine.plan import LOSS_PLOT_FILE, RESULTS_FILE, Plan, make_plan
from ncfm_engine.presets import PRESETS
from ncfm_engine.report import Report, plot_variants
from ncfm_engine.stop import Stopped, StopRequest
from tools.command_line import RECORDING, lock_of

from .findings import curve
from .summary import markdown, summary
from .tables import ARCHITECTURES, Row

DISTIL, PLAIN = "distil", "no augmentation"
STAGES = (DISTIL, PLAIN, *ARCHITECTURES)
STAGES_FILE = "stages.json"  # of the run folder: what was done last, see `_done`
TABLE_FILE, CURVES_FILE = "table.md", "curves.png"
KEPT_BYTES = 2_000_000  # larger sets stay where they were made
RUN_FILES = (METRICS_FILE, LOSS_PLOT_FILE, RESULTS_FILE, COSTS_FILE)


@dataclass(frozen=True)
class Campaign:
    """`work` holds everything, `results` what is worth committing. `options` are those of `make_plan`."""

    rows: Sequence[Row]  # of the table
    chosen: Sequence[str]  # those that are to be made
    work: Path
    results: Path
    sources: dict[str, str]  # where the images of a dataset are, as `load_source` takes it; else in `data`
    data: Path | None
    changes: dict[str, str]  # to all rows
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, stop: StopRequest, report: Report) -> None:
        """Make what is missing. Raises `Stopped` between two stages or, after saving progress, inside one.

        The real images of all of it are opened first: what is wrong with them is told before hours of work.
        """
        missing = [self.plan(row) for row, stage in self.tasks() if self._is_missing(row, stage)]
        for plan in {plan.dataset: plan for plan in missing}.values():
            open_source(plan, stop=stop, report=report)
        for row, stage in self.tasks():
            if self._is_missing(row, stage):
                if stop.requested:
                    raise Stopped(f"before {row.name}, {stage}")
                self._do(row, stage, self.plan(row), stop, report)
                self.write()
        self.write()

    def tasks(self) -> Iterator[tuple[Row, str]]:
        """The sets themselves first, then what else there is to know of them."""
        return ((row, stage) for stage in STAGES for row in self.rows if row.name in self.chosen)

    def plan(self, row: Row) -> Plan:
        dataset = PRESETS[row.preset].dataset
        return make_plan(
            dataset=self.sources.get(dataset, dataset),
            preset=row.preset,
            changes=dict(row.changes) | self.changes,
            output=self.work / row.name,
            reading={} if dataset in self.sources else {"data": self.data},
            resume=True,
            **self.options,
        )

    def evaluation(self, row: Row, stage: str) -> dict[str, Any]:
        """A stage's changes to the recipe; all real images are only trained on in the first one."""
        if stage == DISTIL:
            return {}
        once = {"evaluate.full_repeats": "0"}
        if stage == PLAIN:
            return once | {"evaluate.augment": "none", "evaluate.cutmix": "0"}
        asked = {name: value for name, value in self.changes.items() if name in row.architectures}
        return (
            once
            | {"network.name": stage + row.scale, "evaluate.labels": "hard"}
            | dict(row.architectures)
            | asked
        )

    def write(self) -> None:
        """What is known of the rows that were begun: their files, a summary, a table, their losses.

        Rows that a process with another `work` put into the same results stay there.
        """
        path = self.results / RESULTS_FILE
        with FileLock(self.results.with_name(f".{self.results.name}.lock")):
            there = read_json(path)["sets"] if path.exists() else []
            known = {entry["row"]: entry for entry in there}
            for row in self.rows:
                plan = self.plan(row)
                done = _done(plan)
                stages = done["stages"].items()
                latest = [key for stage, key in stages if not self._repeats_first(row, stage, plan)]
                whole = all((plan.run_folder / name).exists() for name in (RESULTS_FILE, COSTS_FILE))
                if done["stages"].get(DISTIL) and whole:
                    known[row.name] = self._collect(row, plan, latest)
                elif plan.run_folder.exists():  # begun here, anew or on other real images
                    known.pop(row.name, None)
            found = [known[row.name] for row in self.rows if row.name in known]
            content = {"table": self.results.name, "sets": found}
            write_json(path, content)
            write_file(self.results / TABLE_FILE, markdown(content).encode())
            curves = {}
            for entry in found:
                metrics = self.results / entry["row"] / METRICS_FILE
                if metrics.exists() and (lines := metrics.read_text().splitlines()):
                    curves[entry["row"]] = [curve([json.loads(line) for line in lines])]
            plot_variants(curves, self.results / CURVES_FILE)

    def _do(self, row: Row, stage: str, plan: Plan, stop: StopRequest, report: Report) -> None:
        with contextlib.ExitStack() as held:
            if stage == DISTIL:
                held.enter_context(lock_of(plan.output, RECORDING))
                outcome = run(plan, report, stop)
                assert outcome, "one process"
                rows = outcome.rows
            else:
                costs = Costs(plan.run_folder / COSTS_FILE, plan.device, resume=True)
                # all settings, since those in the set may be of an earlier evaluation
                recipe = dataclasses.asdict(self._recipe(row, stage, plan))
                with costs.stage(f"evaluating, {stage}"):
                    rows = evaluate_folder(
                        plan.output,
                        changes=flatten({name: recipe[name] for name in ("evaluate", "network")}),
                        cache=plan.cache,
                        device=plan.device,
                        dataset=plan.dataset,
                        reading=plan.reading,
                        resume=True,
                        stop=stop,
                        report=report,
                    )
                held.enter_context(lock_of(plan.output, RECORDING))  # evaluate.py may have rows for it too
                record_results(plan.output, rows, plan.device)
                write_results(plan.run_folder / RESULTS_FILE, rows, plan.device, costs.stages)
            complete_folder(plan.output)
        stages = _done(plan)["stages"] | {stage: _key(rows[0])}  # of all label kinds
        write_json(plan.run_folder / STAGES_FILE, {"source": _source(plan), "stages": stages})
        forget_progress(plan.run_folder, rows)

    def _is_missing(self, row: Row, stage: str) -> bool:
        plan = self.plan(row)
        return not self._repeats_first(row, stage, plan) and not self._is_done(row, stage, plan)

    def _is_done(self, row: Row, stage: str, plan: Plan) -> bool:
        """Whether this very evaluation was made of the artifact of this very recipe, which is whole."""
        try:
            there = verify_folder(plan.output)
            results, _ = (read_json(plan.run_folder / name) for name in (RESULTS_FILE, COSTS_FILE))
        except (OSError, ArtifactError):
            return False
        if _of_results(Recipe.from_dict(there.metadata.recipe["settings"])) != _of_results(plan.recipe):
            return False
        config = self._recipe(row, stage, plan).evaluate
        wanted = [self._settings(row, stage, plan), there.content_hash, config.repeats]
        rows = [known for known in results["rows"] if _key(known) == wanted]
        whole = {known["full_n"] for known in rows} == {config.full_repeats}
        whole = whole and set(config.labels) <= {known["labels"] for known in rows}
        return whole and _done(plan)["stages"].get(stage) == wanted

    def _recipe(self, row: Row, stage: str, plan: Plan) -> Recipe:
        return plan.recipe.replace(self.evaluation(row, stage))

    def _repeats_first(self, row: Row, stage: str, plan: Plan) -> bool:
        """Whether the first stage has said already what this one would."""
        if stage == DISTIL or self._settings(row, stage, plan) != self._settings(row, DISTIL, plan):
            return False
        here, first = (self._recipe(row, name, plan).evaluate for name in (stage, DISTIL))
        return set(here.labels) <= set(first.labels) and here.repeats <= first.repeats

    def _settings(self, row: Row, stage: str, plan: Plan) -> str:
        recipe = self._recipe(row, stage, plan)
        return settings_hash(recipe.evaluate, recipe.network, recipe.seed)

    def _collect(self, row: Row, plan: Plan, latest: Collection[Any]) -> dict[str, Any]:
        """Copy what is worth committing to `results`; the summary, of the `latest` evaluations."""
        folder = self.results / row.name
        if not all((plan.output / name).exists() for name in FOLDER_FILES):
            complete_folder(plan.output)
        files = [path for name in RUN_FILES if (path := plan.run_folder / name).exists()]
        whole = [plan.output / name for name in FOLDER_FILES]
        if sum(file.stat().st_size for file in whole) <= KEPT_BYTES:
            files += whole
        targets = [f.relative_to(plan.output) if plan.output in f.parents else Path(f.name) for f in files]
        write_files({folder / target: file.read_bytes() for target, file in zip(targets, files, strict=True)})
        info = DistilledDataset.from_folder(plan.output).info
        results, costs = (read_json(plan.run_folder / name) for name in (RESULTS_FILE, COSTS_FILE))
        rows = [known for known in results["rows"] if _key(known) in latest]
        return summary(row.name, info, rows, costs, (plan.output / ARTIFACT_FILE).stat().st_size)


def _of_results(recipe: Recipe) -> Recipe:
    """A recipe without what no result depends on, and without its evaluation, which has a key of its own."""
    usual = Recipe()
    return dataclasses.replace(
        recipe,
        evaluate=usual.evaluate,
        pretrain=dataclasses.replace(recipe.pretrain, at_once=usual.pretrain.at_once),
        distill=dataclasses.replace(recipe.distill, checkpoint_every=usual.distill.checkpoint_every),
    )


def _key(row: dict[str, Any]) -> list[Any]:
    """Tells the evaluation that a result belongs to from all others."""
    return [row["settings"], row["content_hash"], row["n"]]


def _done(plan: Plan) -> dict[str, Any]:
    """{"source": which real images, "stages": {stage: `_key` of its rows}}; no stages where other real images
    were used.
    """
    path = plan.run_folder / STAGES_FILE
    there = read_json(path) if path.exists() else {}
    return there if there.get("source") == _source(plan) else {"source": _source(plan), "stages": {}}


def _source(plan: Plan) -> list[str]:
    data = plan.reading.get("data")
    return [plan.dataset, str(data and Path(data).resolve())]
