"""The matching loop: seeded, resumable, guarded."""

import dataclasses
import functools
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from interruptions import full_disk
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from distilled_data import CheckpointError, DeviceMemoryError, DivergenceError, OutputError, UsageError
from distilled_data.decode import tiles
from distilled_data.randomness import seed_at
from ncfm_engine import distill as module
from ncfm_engine.checkpoint import load_checkpoint
from ncfm_engine.config import DistillConfig, NetworkConfig
from ncfm_engine.distill import CHECKPOINT_FILE, METRICS_FILE, begin, distill, resumable
from ncfm_engine.initial import check_packing, initial_images
from ncfm_engine.memory import Layout
from ncfm_engine.pool import FeaturePool, build
from ncfm_engine.report import OwnWarning
from ncfm_engine.selection import clusters, herding
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
    config = dataclasses.replace(CONFIG, initialisation="noise")
    noise, same, other = (initial_images(config, digits, pool, ipc=2, seed=seed) for seed in (0, 0, 1))
    assert noise.shape == (2, 10, 1, 8, 8)
    assert abs(noise.mean() - 0.5) < 0.05
    assert torch.equal(noise, same)
    assert not torch.equal(noise, other)


@pytest.mark.parametrize("kind", ["herding", "clusters"])
def test_images_can_start_as_typical_ones_of_their_class(digits, pool, kind):
    config = dataclasses.replace(CONFIG, initialisation=kind)
    start = initial_images(config, digits, pool, ipc=3, seed=0)
    chosen = (start * 255).round().to(torch.uint8)
    for label in range(10):
        real = digits.train.images[digits.train.targets == label]
        assert all((image == real).flatten(1).all(1).any() for image in chosen[:, label])
    # With all images of a class their mean would be met: a few of them come nearer than a random draw.
    means = torch.stack([digits.train.images[digits.train.targets == k].float().mean(0) for k in range(10)])
    far = {
        name: (images.mean(0) - means / 255).norm().item()
        for name, images in {
            "chosen": start,
            "random": initial_images(CONFIG, digits, pool, ipc=3, seed=0),
        }.items()
    }
    assert far["chosen"] < far["random"]


def test_typical_images_are_looked_for_where_the_pool_lies(digits, pool):
    elsewhere = dataclasses.replace(pool, trajectory=pool.trajectory.to("meta"))
    config = dataclasses.replace(CONFIG, initialisation="herding")
    with pytest.raises(RuntimeError, match="autocast device_type 'meta'"):  # where no network can compute
        initial_images(config, digits, elsewhere, ipc=2, seed=0)


@pytest.mark.parametrize(
    ("kind", "choose"),
    [
        ("herding", lambda features, label: herding(features, 8)),
        ("clusters", lambda features, label: clusters(features, 8, seed_at(3, "clusters", label))),
    ],
)
def test_typical_images_fill_the_ranks_in_the_order_of_the_choice(digits, kind, choose):
    config = dataclasses.replace(CONFIG, factor=2, initialisation=kind)
    plain = NetworkConfig(width=8, depth=2, norm="none")  # others see no scale
    networks = [build(plain, digits, seed) for seed in range(4)]
    weights = torch.stack([parameters_to_vector(network.parameters()).detach() for network in networks])
    pool = FeaturePool(networks[0], weights.unflatten(0, (2, 2)))
    start = initial_images(config, digits, pool, ipc=2, seed=3)
    network = build(plain, digits, 0)
    chosen = pool.trained[seed_at(3, "choosing network") % 2]
    vector_to_parameters(chosen, network.parameters())
    for label in (0, 7):
        real = digits.train.images[digits.train.targets == label].float() / 255
        maps = network.features((real - digits.mean[0]) / digits.std[0]).detach().flatten(1)
        rows = choose(F.normalize(maps), label)
        small = F.interpolate(real[rows], size=(4, 4), mode="bilinear", antialias=True)
        for rank, (a, b, c, d) in enumerate(small.split(4)):  # row by row
            packed = torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1)
            assert torch.allclose(start[rank, label], packed, atol=1e-6)


def test_the_result_of_an_average_is_that_of_all_steps_with_fading_weights(play, monkeypatch):
    seen, real = [], module.MatchingStep.backward
    monkeypatch.setattr(
        module.MatchingStep,
        "backward",
        lambda self, images, step: seen.append(images.detach().clone()) or real(self, images, step),
    )
    averaged = play(dataclasses.replace(CONFIG, ema=0.7)).images
    first, *others = [*seen, play().images]
    expected = 0.7**12 * first + sum(0.3 * 0.7 ** (11 - k) * images for k, images in enumerate(others))
    assert torch.allclose(averaged, expected, atol=1e-6)


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


def test_a_factor_has_to_divide_both_sides(digits):
    wide, tall = (  # 8 x 6 and 6 x 8
        dataclasses.replace(digits, train=dataclasses.replace(digits.train, images=images))
        for images in (digits.train.images[..., :6], digits.train.images[..., :6, :])
    )
    for source in (wide, tall):
        check_packing(dataclasses.replace(CONFIG, factor=2), source, 1)
        with pytest.raises(UsageError, match="factor 4 does not divide"):
            check_packing(dataclasses.replace(CONFIG, factor=4), source, 1)


def test_an_ipc_above_the_smallest_class_is_refused(digits):
    smallest = int(digits.train.counts.min())
    check_packing(CONFIG, digits, smallest)
    message = rf"{smallest + 1} is more than the {smallest} training .* '8'\. Choose --ipc {smallest} or"
    with pytest.raises(UsageError, match=message):
        check_packing(CONFIG, digits, smallest + 1)


def test_tiles_that_begin_as_the_same_image_are_told_of(digits):
    smallest, packed = int(digits.train.counts.min()), dataclasses.replace(CONFIG, factor=2)
    few = int((digits.train.counts < 36 * 4).sum())
    check_packing(packed, digits, smallest // 4)
    message = f"{few} of the 10 classes .* than the 144 tiles .* '8' has {smallest}:"
    with pytest.warns(UserWarning, match=message):
        check_packing(packed, digits, 36)
    check_packing(dataclasses.replace(packed, initialisation="noise"), digits, 36)


def test_a_row_holds_the_means_over_the_steps_since_the_one_before_and_all_classes(
    play, tmp_path, monkeypatch
):
    losses, real = [], module.MatchingStep.backward
    monkeypatch.setattr(
        module.MatchingStep,
        "backward",
        lambda self, images, step: losses.append(real(self, images, step)) or losses[-1],
    )
    play(folder=tmp_path)
    for row, steps in zip(metrics(tmp_path), (losses[:10], losses[10:]), strict=True):
        for name in ("discrepancy", "calibration", "amplitude", "phase"):
            mean = torch.stack([getattr(step, name) for step in steps]).mean().item()
            assert row[name] == pytest.approx(mean, rel=1e-5)


def test_metrics_have_a_row_per_interval_and_one_for_the_last_step(play, tmp_path):
    play(folder=tmp_path)
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [10, 12]
    names = "step discrepancy calibration amplitude phase learning_rate seconds"
    assert set(rows[0]) == set(names.split())


CHANGES = [
    {},
    {"real_features": "bank", "bank_size": 3, "bank_refresh": 2},
    {"schedule": "cosine"},
    {"discrepancy": "mmd"},
    {"ema": 0.9, "quantised": 0.5, "sampler_steps": 3, "nested": True},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_run_broken_off_anywhere_and_resumed_equals_an_uninterrupted_one(
    play, tmp_path, monkeypatch, change
):
    config = dataclasses.replace(CONFIG, **change)
    whole = play(config, folder=tmp_path / "whole")

    def untimed(name):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in metrics(tmp_path / name)]

    def interrupt(self, images, step, real=module.MatchingStep.backward):
        calls.append(step)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return real(self, images, step)

    for stop in (1, 5, 8, 11):
        calls, parts = [], f"stopped after {stop}"
        with monkeypatch.context() as patch:
            patch.setattr(module.MatchingStep, "backward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                play(config, folder=tmp_path / parts)
        resumed = play(config, folder=tmp_path / parts, resume=True)
        assert torch.equal(resumed.images, whole.images), parts
        assert untimed(parts) == untimed("whole"), parts


def test_a_run_stopped_at_every_step_and_resumed_each_time_equals_an_uninterrupted_one(play, tmp_path):
    config = dataclasses.replace(CONFIG, schedule="cosine")
    for step in range(1, 12):
        with pytest.raises(Stopped, match=f"distil, step {step} of 12"):
            play(config, folder=tmp_path, resume=True, stop=StopRequest(0))
    last = play(config, folder=tmp_path, resume=True, stop=StopRequest(0))
    assert torch.equal(last.images, play(config).images)
    assert [row["step"] for row in metrics(tmp_path)] == [10, 12]


def test_seconds_are_those_of_all_parts_of_a_run(play, tmp_path):
    play(folder=tmp_path)
    before = load_checkpoint(tmp_path / CHECKPOINT_FILE, IDENTITY).progress["seconds"]
    assert play(folder=tmp_path, resume=True).step == 12
    longer = play(dataclasses.replace(CONFIG, iterations=20), folder=tmp_path, resume=True)
    assert 0 < before < longer.seconds < before + 60
    # a row is rounded to thousandths, which may be up
    assert [row["seconds"] > before + 0.001 for row in metrics(tmp_path)] == [False, False, True]


def test_a_checkpoint_of_another_run_is_refused(play, tmp_path):
    play(folder=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IDENTITY, "recipe", "that")
        with pytest.raises(CheckpointError, match="recipe is 'this' there and 'that' here"):
            play(folder=tmp_path, resume=True)


def test_a_run_begun_in_the_place_of_another_goes_on_with_nothing_of_it(play, tmp_path):
    play(folder=tmp_path)
    begin(tmp_path, {"recipe": "that"})
    assert [path.name for path in tmp_path.glob("checkpoint*")] == [CHECKPOINT_FILE]
    assert resumable(tmp_path, {"recipe": "that"}, 12) is None
    play(dataclasses.replace(CONFIG, iterations=0), folder=tmp_path)  # and so is one of no steps
    assert load_checkpoint(tmp_path / CHECKPOINT_FILE, IDENTITY).progress["step"] == 0


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


def fails_for_memory(fitting: Layout):
    real = module.MatchingStep.backward

    def backward(self, images, step):
        fits = self.layout.classes <= fitting.classes and self.real.layout.images <= fitting.images
        if step == 5 and not fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return real(self, images, step)

    return backward


def test_out_of_memory_halves_the_chunks_once_and_changes_nothing_else(play, tmp_path, monkeypatch):
    whole = play(layout=Layout(9, 39))
    monkeypatch.setattr(module.MatchingStep, "backward", fails_for_memory(Layout(5, 20)))
    with pytest.warns(OwnWarning, match=r"out of memory at step 6 .* 5 classes and 20 real images at once"):
        halved = play(layout=Layout(9, 39), folder=tmp_path)
    assert torch.allclose(halved.images, whole.images, atol=1e-3)


def test_out_of_memory_again_stops_with_the_checkpoint_kept(play, tmp_path, monkeypatch):
    monkeypatch.setattr(module.MatchingStep, "backward", fails_for_memory(Layout(4, 20)))
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(DeviceMemoryError, match=r"step 6 does not fit .* with 5 classes .*--memory"),
    ):
        play(layout=Layout(10, 40), folder=tmp_path)
    assert load_checkpoint(tmp_path / CHECKPOINT_FILE, IDENTITY).progress["step"] == 4


def test_one_class_and_one_image_at_once_are_not_cut_further(play, monkeypatch):
    monkeypatch.setattr(module.MatchingStep, "backward", fails_for_memory(Layout(0, 0)))
    with pytest.raises(DeviceMemoryError, match=r"step 6 does not fit .* with 1 classes and 1 real images"):
        play(dataclasses.replace(CONFIG, real_batch=2), layout=Layout(1, 1))


def test_a_row_that_was_cut_off_is_written_again(play, tmp_path):
    longer = dataclasses.replace(CONFIG, iterations=14)
    play(folder=tmp_path)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 14, "discre')
    play(longer, folder=tmp_path, resume=True)
    assert [row["step"] for row in metrics(tmp_path)] == [10, 12, 14]


def test_metrics_that_find_no_space_are_written_when_there_is_some(play, tmp_path):
    longer = dataclasses.replace(CONFIG, iterations=40, checkpoint_every=50)
    told = []

    def report(stage, done, total, **figures):
        if done == 10:  # the next row is cut off
            limit((tmp_path / METRICS_FILE).stat().st_size + 20)
        if done == 20:
            told.append(metrics(tmp_path))
            limit(None)

    words = rf"could not write .*{METRICS_FILE}: .*run goes on without"
    with full_disk() as limit, pytest.warns(UserWarning, match=words):
        play(longer, folder=tmp_path, report=report)
    assert [row["step"] for row in told[0]] == [10]
    assert [row["step"] for row in metrics(tmp_path)] == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("what", "poisoned", "at", "message"),
    [
        ("loss", (3,), 6, "the loss of class 3 at step 7 is not finite"),
        ("image", (1, 3, 0, 2, 5), 7, "an image of class 3 at step 8 is not finite"),  # of a finite loss
        ("psi", (0,), 7, "the sampling network at step 8 is not finite"),
    ],
)
def test_what_is_not_finite_is_named_and_never_reaches_the_checkpoint_that_is_due(
    play, tmp_path, monkeypatch, what, poisoned, at, message
):
    def poison(self, images, step, real=module.MatchingStep.backward):
        losses = real(self, images, step)
        if step == at:  # counted from zero
            psi = next(self.sampler.parameters()).grad
            {"loss": losses.discrepancy, "image": images.grad, "psi": psi}[what][poisoned] = float("nan")
        return losses

    monkeypatch.setattr(module.MatchingStep, "backward", poison)
    with pytest.raises(DivergenceError, match=message):
        play(folder=tmp_path)
    monkeypatch.undo()
    assert metrics(tmp_path) == []
    assert load_checkpoint(tmp_path / CHECKPOINT_FILE, IDENTITY).progress["step"] == 4
    assert torch.equal(play(folder=tmp_path, resume=True).images, play().images)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiling_on_a_full_disk_is_told_with_ways_out(play, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    words = r"torch\.compile could not write .*: File too large\..* off"
    with full_disk(100), pytest.raises(OutputError, match=words):
        play(dataclasses.replace(CONFIG, iterations=1), compile=True)


def test_sets_that_are_made_one_after_the_other_are_all_compiled(play, monkeypatch):
    compiled, compile = [], functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda *args, **how: compiled.append(args) or compile(*args, **how))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    config = dataclasses.replace(CONFIG, iterations=1)
    for seed in range(4):
        play(config, seed, compile=True)
    assert len(compiled) == 4 * 4  # two networks, two passes each
