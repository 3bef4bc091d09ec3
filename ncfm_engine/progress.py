"""Trainings one after the other, recorded in one checkpoint: what is finished is not trained again, and what
was running goes on from where it was.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from distilled_data import CheckpointError, DivergenceError, OutputError
from distilled_data.randomness import generator_states, seeded_with, set_generators

from .checkpoint import discard, load_checkpoint, save_checkpoint, under
from .report import dispensable
from .train import CHECKPOINT_SECONDS, Training


class Finished(NamedTuple):
    """The accuracies of a network in percent at the tests of its training, in order, and its loss late in it
    (`Training.losses`).
    """

    scores: list[float]
    loss: float


class Progress:
    """`finished` trainings by "name repeat", the `seconds` spent by name, and the state of the one that runs.

    It lies at `path`, or without one in memory. Raises `CheckpointError` for that of another `identity`, and
    for a damaged one. If the progress is `dispensable`, warnings tell of what cannot be read or written,
    instead of errors, and less than `CHECKPOINT_SECONDS` of finished trainings are not worth a file.
    """

    def __init__(
        self, path: Path | None, identity: Mapping[str, Any], resume: bool, *, dispensable: bool = False
    ):
        self.path, self.identity = path, identity
        self.finished: dict[str, Finished] = {}
        self.seconds: dict[str, float] = {}
        self._dispensable, self._found, self._saved = dispensable, None, time.monotonic()
        if path and resume:
            try:
                self._found = load_checkpoint(path, identity)
            except (CheckpointError, OutputError) as error:
                if not dispensable:
                    raise
                warnings.warn(f"{error} This training begins anew.", stacklevel=2)
        else:
            self.forget()
        if self._found:
            # An older version recorded "scores" instead, which are trained again.
            finished = self._found.progress.get("finished", {})
            self.finished = {name: Finished(*values) for name, values in finished.items()}
            self.seconds = self._found.progress["seconds"]

    def forget(self) -> None:
        """Remove what lies at the path."""
        if self.path:
            discard(self.path)

    def run(
        self,
        name: str,
        title: str,
        repeats: Sequence[int],
        start: Callable[[], Training],
        *,
        seed: int,
        after_test: Callable[[list[float]], None] = lambda scores: None,
        **options: Any,
    ) -> None:
        """Run the training of these repeats that `start` makes, from where it was stopped, and record it.

        What networks themselves draw, as for dropout, begins at `seed`. `after_test` and `options` are those
        of `Training.run`; tests before the stop are told again.
        """
        began, before = time.monotonic(), self.seconds.get(name, 0.0)
        training = start()
        device = training.networks.weights.device

        def save(tensors: Mapping[str, Tensor], state: Mapping[str, Any], running: str = title) -> None:
            self.seconds[name] = before + time.monotonic() - began
            if self.path is None:
                return
            states = {f"generator.{kind}": state for kind, state in generator_states(device).items()}
            progress = {"finished": self.finished, "seconds": self.seconds}
            progress |= {"running": running, "training": state}
            with dispensable() if self._dispensable else contextlib.nullcontext():
                save_checkpoint(self.path, {**tensors, **states}, identity=self.identity, progress=progress)
            self._saved = time.monotonic()

        with seeded_with(seed, device):
            if self._found and self._found.progress["running"] == title:
                training.restore(self._found.tensors, self._found.progress["training"])
                set_generators(under("generator.", self._found.tensors), device)
                for scores in training.scores:
                    after_test(scores)
            self._found = None
            training.run(title, save=save, after_test=after_test, **options)
        self.seconds[name] = before + time.monotonic() - began  # for those of the next repeats
        if not training.networks.weights.isfinite().all() or any(map(math.isnan, training.scores[-1])):
            raise DivergenceError(
                f"{title}: the weights or the logits are not finite after {training.step} steps. Lower "
                "evaluate.learning_rate."
            )
        each = zip(*training.scores, strict=True)
        for repeat, scores, loss in zip(repeats, each, training.losses.tolist(), strict=True):
            self.finished[f"{name} {repeat}"] = Finished(list(scores), loss)
        if not self._dispensable or time.monotonic() - self._saved >= CHECKPOINT_SECONDS:
            save({}, {}, running="")
