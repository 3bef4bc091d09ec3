"""What only a GPU can show. Skipped where there is none.

There `-o filterwarnings=default` keeps a warning of CUDA's own from failing a test.
"""

import dataclasses
import warnings
from contextlib import contextmanager

import pytest
import torch

from distilled_data import DistilledDataset
from ncfm_engine.batches import Batches, real_loader, reseeded
from ncfm_engine.config import DistillConfig, EvaluateConfig, LabelConfig, NetworkConfig, PretrainConfig
from ncfm_engine.distill import distill
from ncfm_engine.evaluate import evaluate, random_subset
from ncfm_engine.initial import initial_images
from ncfm_engine.label import teacher
from ncfm_engine.matching import MatchingStep
from ncfm_engine.memory import Footprint, Layout
from ncfm_engine.pool import FeaturePool
from ncfm_engine.pretrain import pretrain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SMALL = DistillConfig(iterations=12, real_batch=100, frequencies=256, factor=1, checkpoint_every=4)


@pytest.fixture
def pool_there(pool):
    return dataclasses.replace(pool, trajectory=pool.trajectory.cuda())


def game(
    digits, pool: FeaturePool, device: str, config=SMALL, **options
) -> tuple[MatchingStep, torch.Tensor]:
    images = initial_images(config, digits, pool, ipc=10, seed=0).to(device)
    return MatchingStep(config, digits, pool, ipc=10, seed=0, device=device, **options), images


def test_a_step_on_the_gpu_is_the_step_on_the_cpu_but_for_the_frequencies(
    digits, pool, pool_there, monkeypatch
):
    # A generator on a GPU draws other numbers; a discrepancy without frequencies must agree.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which alone makes 2 %
    config = dataclasses.replace(SMALL, discrepancy="mmd")
    (here, images), (there, images_there) = (
        game(digits, pool, "cpu", config),
        game(digits, pool_there, "cuda", config),
    )
    losses, losses_there = here.backward(images, 3), there.backward(images_there, 3)
    assert torch.allclose(losses.discrepancy, losses_there.discrepancy.cpu(), rtol=1e-2, atol=1e-4)
    assert torch.allclose(losses.calibration, losses_there.calibration.cpu(), rtol=1e-2)
    difference = (images.grad - images_there.grad.cpu()).norm() / images.grad.norm()
    assert difference < 0.01


def test_typical_images_are_found_with_a_pool_on_the_gpu(digits, pool_there):
    config = dataclasses.replace(SMALL, initialisation="herding")
    images = initial_images(config, digits, pool_there, ipc=2, seed=0)
    assert images.device.type == "cpu"
    assert images.shape == (2, 10, 1, 8, 8)


@contextmanager
def no_waiting():
    """Whatever waits for the device in here raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype, once
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("features", ["fresh", "bank"])
def test_a_step_never_waits_for_the_device(digits, pool_there, features, resident):
    config = dataclasses.replace(SMALL, real_features=features, bank_size=2, bank_refresh=1)
    layout = Layout(10, 1000, images_resident=resident, bank_resident=resident)
    step, images = game(digits, pool_there, "cuda", config, layout=layout)
    step.backward(images, 0)
    with no_waiting():
        step.backward(images, 1)


@pytest.mark.parametrize("features", ["fresh", "bank"])
def test_what_lies_in_host_memory_gives_the_same_losses(digits, pool_there, features):
    config = dataclasses.replace(SMALL, real_features=features, bank_size=2, bank_refresh=1)
    values = []
    for resident in (True, False):
        layout = Layout(4, 64, images_resident=resident, bank_resident=resident)
        step, images = game(digits, pool_there, "cuda", config, layout=layout)
        values.append(torch.stack([step.backward(images, number).discrepancy for number in range(4)]))
    assert torch.allclose(*values, rtol=1e-4)


@pytest.mark.parametrize("layout", [Layout(10, 1000), Layout(3, 100), Layout(1, 10)])
def test_the_memory_count_holds_on_the_gpu(digits, pool_there, layout):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    step, images = game(digits, pool_there, "cuda", layout=layout)
    step.backward(images, 0)
    torch.cuda.reset_peak_memory_stats()
    step.backward(images, 1)
    kept = pool_there.trajectory[..., 0].numel()
    counts = Footprint.of(SMALL, pool_there.template, digits, ipc=10, kept_networks=kept, device="cuda")
    assert torch.cuda.max_memory_allocated() - before <= counts.total(layout)


def test_a_run_resumed_on_the_gpu_goes_on(digits, pool_there, tmp_path):
    options = {"ipc": 2, "seed": 0, "device": "cuda"}
    there = {"folder": tmp_path, "identity": {}}
    distill(dataclasses.replace(SMALL, iterations=8), digits, pool_there, **options, **there)
    resumed = distill(SMALL, digits, pool_there, resume=True, **options, **there)
    whole = distill(SMALL, digits, pool_there, **options)
    short = distill(dataclasses.replace(SMALL, iterations=4), digits, pool_there, **options)
    assert resumed.step == 12
    assert resumed.images.device.type == "cuda"
    apart, less = ((other.images - whole.images).abs().mean() for other in (resumed, short))
    assert apart < 0.3 * less  # by rounding; had it restored the step alone, it would be as far as `short`


def test_compiled_half_precision_steps_stay_close(digits, pool_there):
    values = []
    for precision, compiled in (("float32", False), ("bfloat16", True)):
        config = dataclasses.replace(SMALL, precision=precision)
        step, images = game(digits, pool_there, "cuda", config, compile=compiled)
        values.append(step.backward(images, 0).discrepancy)
    assert torch.allclose(*values, rtol=0.03)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_networks_trained_together_learn_and_their_set_is_evaluated(digits, tmp_path, precision):
    network = NetworkConfig(width=16, depth=2)
    config = PretrainConfig(networks=3, epochs=6, learning_rate=0.1, cutmix=0, precision=precision)
    pool = pretrain(config, network, digits, seed=0, device="cuda", cache=tmp_path)
    assert teacher(LabelConfig(), network, pool, digits, "cuda")["teacher"]["accuracy"] > 60
    dataset = random_subset(digits, ipc=5, seed=0, pool=pool, labels="soft", device="cuda")
    how = EvaluateConfig(epochs=20, repeats=3, full_repeats=0, precision=precision)
    rows = evaluate(dataset, digits, how, network, seed=0, device="cuda", pool=pool)
    assert all(row["last_mean"] > 25 for row in rows)


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_a_loader_on_the_gpu_gives_the_batches_of_the_cpu_and_never_waits_for_it(artifact, labels):
    data = DistilledDataset(artifact, labels)
    options = {"augment": "color_crop_cutout", "mix": "cutmix|mixup", "seed": 3}
    expected = [*data.loader(12, **options), *data.loader(12, augment=torch.sqrt)]
    loaders = data.loader(12, device="cuda", **options), data.loader(12, device="cuda", augment=torch.sqrt)
    [list(loader) for loader in loaders]  # the first pass fills the caches of the device
    with no_waiting():
        for loader in loaders:
            loader.set_epoch(0)
        batches = [batch for loader in loaders for batch in loader]
    for batch, other in zip(batches, expected, strict=True):
        for here, there in zip(batch, other, strict=True):
            torch.testing.assert_close(here.cpu(), there, atol=1e-4, rtol=1e-4)


def test_the_batches_of_networks_trained_together_are_those_of_the_cpu_and_nothing_waits_for_them(digits):
    def batches(device: str) -> Batches:
        loader = real_loader(digits, digits.train, 100, device, augment="color_crop|cutout")
        return Batches([reseeded(loader, seed) for seed in (3, 5)], classes=10, cutmix=0.5)

    here, there = batches("cpu"), batches("cuda")
    assert there._ahead > here._ahead == 1
    [there.at(1, number) for number in range(len(there))]  # fills the caches of the device
    with no_waiting():
        made = [there.at(0, number) for number in range(len(there))]
    for number, batch in enumerate(made):
        for one, other in zip(here.at(0, number), batch, strict=True):
            torch.testing.assert_close(other.cpu(), one, atol=1e-4, rtol=1e-4)
