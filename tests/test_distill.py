"""The matching loop: seeded, resumable, guarded."""

import dataclasses
import functools
import json

import pytest
import torch

from distilled_data import CheckpointError, DeviceMemoryError, DivergenceError, OutputError, UsageError
from distilled_data.decode import tiles
from ncfm_engine import distill as module
from ncfm_engine.checkpoint import load_checkpoint
from ncfm_engine.config import DistillConfig
from ncfm_engine.distill import CHECKPOINT_FILE, METRICS_FILE, distill
from ncfm_engine.initial import initial_images
from ncfm_engine.memory import Layout
from ncfm_engine.stop import Stopped, StopRequest

IDENTITY = {"recipe": "this"}
CONFIG = DistillConfig(iterations=12, real_batch=20, frequencies=32, factor=1, checkpoint_every=4)


@pytest.fixture
def play(digits, pool):
    def play(config=CONFIG, seed=0, **options):
        return distill(config, digits, pool, ipc=2, seed=seed, device="cpu", identity=IDENTITY, **options)

    return play


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_the_same_seed_gives_the_same_images_and_another_seed_others(play):
    first = play().images
    assert torch.equal(play().images, first)
    assert not torch.equal(play(seed=1).images, first)


def test_images_stay_pixels_and_are_stored_as_bytes(play):
    result = play(dataclasses.replace(CONFIG, learning_rate=1.0))
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    stored = result.quantised()
    assert stored.dtype == torch.uint8
    assert (stored / 255 - result.images).abs().max() <= 0.5 / 255 + 1e-6


def test_one_iteration_moves_a_pixel_by_the_learning_rate_whatever_the_number_of_classes(play, digits, pool):
    # A reference that steps its optimiser once per class moves it by sqrt(classes) times that.
    start = initial_images(CONFIG, digits, pool, ipc=2, seed=0)
    moved = (play(dataclasses.replace(CONFIG, iterations=1)).images - start).abs().max()
    assert moved == pytest.approx(CONFIG.learning_rate, rel=1e-3)


def test_the_sampling_network_plays_against_the_images(play, tmp_path):
    still = dataclasses.replace(CONFIG, learning_rate=0.0, calibration=0.0, iterations=10)
    play(dataclasses.replace(still, sampler_learning_rate=0.0), folder=tmp_path / "fixed")
    play(dataclasses.replace(still, sampler_learning_rate=1e-2), folder=tmp_path / "playing")
    fixed, playing = (metrics(tmp_path / name)[-1]["discrepancy"] for name in ("fixed", "playing"))
    assert playing > 1.05 * fixed


def test_without_an_adversary_the_frequencies_are_not_learned(play):
    quiet = dataclasses.replace(CONFIG, discrepancy="cfd")
    loud = dataclasses.replace(quiet, sampler_learning_rate=10.0)
    assert torch.equal(play(quiet).images, play(loud).images)


def rates_of(play, config, folder) -> list[float]:
    play(config, folder=folder)
    return [row["learning_rate"] for row in metrics(folder)]


def test_a_cosine_schedule_falls_from_the_learning_rate_to_nothing(play, tmp_path):
    config = dataclasses.replace(CONFIG, schedule="cosine", iterations=100, learning_rate=0.4)
    rates = rates_of(play, config, tmp_path)
    assert rates[:1] + rates[4:5] == pytest.approx([0.4, 0.2], rel=0.05)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.002
    assert set(rates_of(play, dataclasses.replace(config, schedule="constant"), tmp_path / "constant")) == {
        0.4
    }


def test_a_plateau_halves_the_learning_rate(play, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PLATEAU_STEPS", 20)  # two rows
    still = dataclasses.replace(CONFIG, schedule="plateau", iterations=120, learning_rate=1e-6)
    rates = rates_of(play, still, tmp_path)
    assert rates[0] == 1e-6
    assert rates[-1] <= 0.5e-6
    assert {round(1e-6 / rate) for rate in rates} <= {1, 2, 4, 8, 16}


def test_images_start_as_real_images_of_their_class(digits, pool):
    start = (initial_images(CONFIG, digits, pool, ipc=3, seed=0) * 255).round().to(torch.uint8)
    for label in range(10):
        real = digits.train.images[digits.train.targets == label]
        for image in start[:, label]:
            assert (image == real).flatten(1).all(1).any()


def test_packed_images_start_as_shrunk_real_images_one_per_tile(digits, pool):
    start = initial_images(dataclasses.replace(CONFIG, factor=2), digits, pool, ipc=2, seed=0)
    real = torch.nn.functional.interpolate(
        digits.train.images.float() / 255, size=(4, 4), mode="bilinear", antialias=True
    )
    parts = (
        tiles(start.flatten(0, 1), 2).unflatten(0, (2, 10)).transpose(0, 1).flatten(1, 2)
    )  # [C, 8, 1, 4, 4]
    for label in range(10):
        of_class = real[digits.train.targets == label]
        nearest = [(tile - of_class).abs().flatten(1).mean(1).min() for tile in parts[label]]
        assert max(nearest) < 1e-6


def test_images_can_start_as_noise(digits, pool):
    noise = initial_images(dataclasses.replace(CONFIG, initialisation="noise"), digits, pool, ipc=2, seed=0)
    assert noise.shape == (2, 10, 1, 8, 8)
    assert abs(noise.mean() - 0.5) < 0.05


@pytest.mark.parametrize("kind", ["herding", "clusters"])
def test_images_can_start_as_typical_ones_of_their_class(digits, pool, kind):
    def start(seed=0, ipc=3):
        config = dataclasses.replace(CONFIG, initialisation=kind)
        return initial_images(config, digits, pool, ipc=ipc, seed=seed)

    chosen = (start() * 255).round().to(torch.uint8)
    for label in range(10):
        real = digits.train.images[digits.train.targets == label]
        assert all((image == real).flatten(1).all(1).any() for image in chosen[:, label])
    assert torch.equal(start(), start())
    # With all images of a class their mean would be met: a few of them come nearer than a random draw.
    means = torch.stack([digits.train.images[digits.train.targets == k].float().mean(0) for k in range(10)])
    far = {
        name: (images.mean(0) - means / 255).norm().item()
        for name, images in {
            "chosen": start(),
            "random": initial_images(CONFIG, digits, pool, ipc=3, seed=0),
        }.items()
    }
    assert far["chosen"] < far["random"]


def test_the_result_of_an_average_lags_behind_the_images(play):
    moved = {
        decay: play(dataclasses.replace(CONFIG, ema=decay)).images
        - play(dataclasses.replace(CONFIG, iterations=0)).images
        for decay in (0.0, 0.5, 0.99)
    }
    lengths = [difference.norm().item() for difference in moved.values()]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[2] < 0.15 * lengths[0]


def test_an_average_does_not_change_the_game(play, tmp_path):
    for name, decay in (("without", 0.0), ("with", 0.9)):
        play(dataclasses.replace(CONFIG, ema=decay), folder=tmp_path / name)
    losses = [[row["discrepancy"] for row in metrics(tmp_path / name)] for name in ("without", "with")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("share", "rounded"), [(0.0, []), (0.25, [9, 10, 11]), (1.0, list(range(12)))])
def test_the_last_steps_see_the_images_as_bytes(play, monkeypatch, share, rounded):
    seen, real = [], module.MatchingStep.backward

    def look(self, images, step):
        seen.append(torch.equal((images * 255).round() / 255, images.detach()))
        return real(self, images, step)

    monkeypatch.setattr(module.MatchingStep, "backward", look)
    play(dataclasses.replace(CONFIG, quantised=share))
    assert [step for step in range(1, 12) if seen[step]] == [step for step in rounded if step]


def test_more_steps_of_the_sampling_network_raise_the_discrepancy_more(play, tmp_path):
    still = dataclasses.replace(
        CONFIG, learning_rate=0.0, calibration=0.0, sampler_learning_rate=1e-3, iterations=10
    )
    values = {}
    for steps in (1, 5):
        play(dataclasses.replace(still, sampler_steps=steps), folder=tmp_path / str(steps))
        values[steps] = metrics(tmp_path / str(steps))[-1]["discrepancy"]
    assert values[5] > 1.02 * values[1]


def test_psi_has_as_many_turns_as_were_asked_for_and_the_last_is_that_of_the_images(play, monkeypatch):
    turns, real = [], module.MatchingStep.ascend
    monkeypatch.setattr(
        module.MatchingStep,
        "ascend",
        lambda self, images, step, turn: turns.append((step, turn)) or real(self, images, step, turn),
    )
    play(dataclasses.replace(CONFIG, sampler_steps=3, iterations=2))
    assert turns == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_a_factor_that_does_not_divide_the_image_is_refused(digits, pool):
    with pytest.raises(UsageError, match="factor 3 does not divide the image size 8x8"):
        initial_images(dataclasses.replace(CONFIG, factor=3), digits, pool, ipc=1, seed=0)


def test_an_ipc_above_the_smallest_class_is_refused(digits, pool):
    with pytest.raises(UsageError, match="ipc=2000 is more than the 1"):
        initial_images(CONFIG, digits, pool, ipc=2000, seed=0)


def test_metrics_have_a_row_per_interval_and_one_for_the_last_step(play, tmp_path):
    play(folder=tmp_path)
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [10, 12]
    names = "step discrepancy calibration amplitude phase learning_rate seconds"
    assert set(rows[0]) == set(names.split())


CHANGES = [
    {},
    {"real_features": "bank", "bank_size": 3, "bank_refresh": 2},
    {"schedule": "plateau"},
    {"schedule": "cosine"},
    {"discrepancy": "mmd"},
    {"ema": 0.9, "quantised": 0.5, "sampler_steps": 3, "nested": True},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("stop", [1, 5, 8, 11])
def test_a_run_broken_off_anywhere_and_resumed_equals_an_uninterrupted_one(
    play, tmp_path, monkeypatch, stop, change
):
    config, calls = dataclasses.replace(CONFIG, **change), []
    whole = play(config, folder=tmp_path / "whole")

    def interrupt(self, images, step, real=module.MatchingStep.backward):
        calls.append(step)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return real(self, images, step)

    with monkeypatch.context() as patch:
        patch.setattr(module.MatchingStep, "backward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            play(config, folder=tmp_path / "parts")
    resumed = play(config, folder=tmp_path / "parts", resume=True)
    assert torch.equal(resumed.images, whole.images)
    untimed = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in metrics(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert untimed[0] == untimed[1]


def test_a_run_stopped_at_every_step_and_resumed_each_time_equals_an_uninterrupted_one(play, tmp_path):
    config = dataclasses.replace(CONFIG, schedule="plateau")
    for step in range(1, 12):
        with pytest.raises(Stopped, match=f"distil, step {step} of 12"):
            play(config, folder=tmp_path, resume=True, stop=StopRequest(0))
    last = play(config, folder=tmp_path, resume=True, stop=StopRequest(0))
    assert torch.equal(last.images, play(config).images)
    assert [row["step"] for row in metrics(tmp_path)] == [10, 12]


def test_a_checkpoint_of_another_run_is_refused(play, tmp_path):
    play(folder=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IDENTITY, "recipe", "that")
        with pytest.raises(CheckpointError, match="recipe is 'this' there and 'that' here"):
            play(folder=tmp_path, resume=True)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(play, tmp_path):
    whole = play(folder=tmp_path)
    path = tmp_path / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="going on from the one before it"):
        assert torch.equal(play(folder=tmp_path, resume=True).images, whole.images)


def test_a_checkpoint_beyond_the_iterations_asked_for_is_refused(play, tmp_path):
    play(folder=tmp_path)
    with pytest.raises(CheckpointError, match="stands at step 12, beyond the 5 iterations"):
        play(dataclasses.replace(CONFIG, iterations=5), folder=tmp_path, resume=True)


def fails_for_memory(times: int):
    real = module.MatchingStep.backward

    def backward(self, images, step):
        nonlocal times
        if step == 5 and times:
            times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return real(self, images, step)

    return backward


def test_out_of_memory_halves_the_chunks_once_and_changes_nothing_else(play, tmp_path, monkeypatch):
    whole = play(layout=Layout(10, 40))
    monkeypatch.setattr(module.MatchingStep, "backward", fails_for_memory(1))
    with pytest.warns(UserWarning, match=r"out of memory at step 6 .* 5 classes and 20 real images at once"):
        halved = play(layout=Layout(10, 40), folder=tmp_path)
    assert torch.allclose(halved.images, whole.images, atol=1e-3)


def test_out_of_memory_again_stops_with_the_checkpoint_kept(play, tmp_path, monkeypatch):
    monkeypatch.setattr(module.MatchingStep, "backward", fails_for_memory(2))
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(DeviceMemoryError, match=r"step 6 does not fit .* with 5 classes .*--memory"),
    ):
        play(layout=Layout(10, 40), folder=tmp_path)
    assert load_checkpoint(tmp_path / CHECKPOINT_FILE, IDENTITY).progress["step"] == 4


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(play, tmp_path, monkeypatch):
    def poison(self, images, step, real=module.MatchingStep.backward):
        losses = real(self, images, step)
        if step == 7:  # the loss is finite, and the checkpoint after this step is due
            images.grad[0] = float("nan")
        return losses

    monkeypatch.setattr(module.MatchingStep, "backward", poison)
    with pytest.raises(DivergenceError, match="an image of class 0 at step 8 is not finite"):
        play(folder=tmp_path)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / CHECKPOINT_FILE, IDENTITY).progress["step"] == 4


def test_a_sampling_network_that_is_not_finite_never_reaches_a_checkpoint(play, tmp_path, monkeypatch):
    def poison(self, images, step, real=module.MatchingStep.backward):
        losses = real(self, images, step)
        if step == 7:
            next(self.sampler.parameters()).grad[0] = float("nan")
        return losses

    monkeypatch.setattr(module.MatchingStep, "backward", poison)
    with pytest.raises(DivergenceError, match="the sampling network at step 8 is not finite"):
        play(folder=tmp_path)
    assert load_checkpoint(tmp_path / CHECKPOINT_FILE, IDENTITY).progress["step"] == 4


def test_metrics_that_cannot_be_written_are_an_output_error(play, tmp_path):
    real_open = module.Path.open

    def full(path, mode="r", *options):
        if path.name == METRICS_FILE and mode == "a":
            raise OSError(28, "No space left on device")
        return real_open(path, mode, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Path, "open", full)
        with pytest.raises(OutputError, match="No space left"):
            play(folder=tmp_path)


def test_a_loss_that_is_not_finite_names_step_and_class_and_keeps_the_last_checkpoint(
    play, tmp_path, monkeypatch
):
    def poison(self, images, step, real=module.MatchingStep.backward):
        losses = real(self, images, step)
        if step == 6:  # counted from zero
            losses.discrepancy[3] = float("nan")
        return losses

    monkeypatch.setattr(module.MatchingStep, "backward", poison)
    with pytest.raises(DivergenceError, match="the loss of class 3 at step 7 is not finite"):
        play(folder=tmp_path)
    monkeypatch.undo()
    assert metrics(tmp_path) == []
    assert load_checkpoint(tmp_path / CHECKPOINT_FILE, IDENTITY).progress["step"] == 4
    assert torch.equal(play(folder=tmp_path, resume=True).images, play().images)


def test_sets_that_are_made_one_after_the_other_are_all_compiled(play, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    config = dataclasses.replace(CONFIG, iterations=1)
    for seed in range(4):
        play(config, seed, compile=True)
