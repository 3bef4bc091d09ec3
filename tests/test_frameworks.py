"""Training loops of others, with hard and with soft labels, and without a warning: warnings are errors."""

import random
import re
import runpy
import sys

import pytest
import torch
from commands import ROOT
from torch import nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    StackDataset,
    WeightedRandomSampler,
    random_split,
)

from distilled_data import DistilledDataset, soft_cross_entropy

FOLDER = ROOT / "tools" / "results" / "digits" / "digits-ipc10"
EXAMPLES = sorted((ROOT / "tools" / "examples").glob("*.py"))


@pytest.fixture(params=["hard", "soft"])
def data(request) -> DistilledDataset:
    return DistilledDataset.from_folder(FOLDER, labels=request.param)


def seen(batches, data: DistilledDataset) -> list[int]:
    """The samples of these batches as indices of the set; each must come with its own target."""
    found = []
    everything, labels = data[:]
    for images, targets in batches:
        index = (images[:, None] - everything[None]).abs().amax((2, 3, 4)).argmin(1)
        assert torch.equal(targets, labels[index])
        found += index.tolist()
    return found


def learned(batches, data: DistilledDataset) -> float:
    """Share of the set that a linear network knows after these batches."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimiser = torch.optim.Adam(network.parameters(), 0.02)
    for images, targets in batches:
        optimiser.zero_grad()
        soft_cross_entropy(network(images), targets).backward()
        optimiser.step()
    return (network(data[:][0]).argmax(1) == data.targets).float().mean().item()


def test_a_dataloader(data):
    loader = DataLoader(data, batch_size=16, shuffle=True)
    assert sorted(seen(loader, data)) == list(range(100))
    assert learned((batch for _ in range(15) for batch in loader), data) > 0.9


def test_a_dataloader_with_two_spawned_workers(capfd):
    hard, soft = (DistilledDataset.from_folder(FOLDER, labels=labels) for labels in ("hard", "soft"))
    both = StackDataset(hard, soft)  # in the same two processes, whose start takes seconds
    batches = list(DataLoader(both, 30, shuffle=True, num_workers=2, multiprocessing_context="spawn"))
    for data, of_one in zip((hard, soft), zip(*batches, strict=True), strict=True):
        assert sorted(seen(of_one, data)) == list(range(100))
    assert "Warning" not in capfd.readouterr().err  # of a worker, where warnings are no errors


def test_random_split(data):
    parts = random_split(data, [0.7, 0.3], torch.Generator().manual_seed(0))
    found = [seen(DataLoader(part, 16, shuffle=True), data) for part in parts]
    assert [len(part) for part in found] == [70, 30]
    assert sorted(found[0] + found[1]) == list(range(100))


def test_a_weighted_random_sampler(data):
    weights = (data.targets == 3).double()
    found = seen(DataLoader(data, 16, sampler=WeightedRandomSampler(weights, 40)), data)
    assert {int(data.targets[index]) for index in found} == {3}
    assert len(found) == 40


def test_a_distributed_sampler_on_two_ranks(data):
    samplers = [DistributedSampler(data, num_replicas=2, rank=rank, seed=1) for rank in range(2)]
    found = [seen(DataLoader(data, 16, sampler=sampler), data) for sampler in samplers]
    assert [len(part) for part in found] == [50, 50]
    assert sorted(found[0] + found[1]) == list(range(100))


@pytest.mark.parametrize("ours", [False, True], ids=["over the set", "of the set"])
def test_a_stateful_dataloader_goes_on_in_the_middle_of_an_epoch(data, ours):
    loader_class = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def make():
        if ours:
            return data.dataloader(16, augment="color", mix="cutmix", seed=2, loader_class=loader_class)
        return loader_class(data, 16, shuffle=True, generator=torch.Generator().manual_seed(2))

    whole = make()
    epochs = [list(whole) for _ in range(3)]
    stopped = make()
    list(stopped)
    passing = iter(stopped)
    for _ in range(3):
        next(passing)
    resumed = make()
    resumed.load_state_dict(stopped.state_dict())
    expected = epochs[1][3:]
    if ours:  # torchdata draws from its own generator between epochs, and does not draw again what it drew
        expected, got = [*expected, *epochs[2]], [*resumed, *resumed]
    else:
        got = list(resumed)
    assert len(got) == len(expected)
    for batch, other in zip(got, expected, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(batch, other, strict=True))


@pytest.mark.parametrize("step", [9, 14], ids=["in the middle of an epoch", "at the end of one"])
def test_lightning_goes_on_with_the_loader(data, step, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Watching(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network, self.seen = nn.Linear(64, 10), []

        def training_step(self, batch, index):
            images, targets = batch
            self.seen.append(images)
            return soft_cross_entropy(self.network(images.flatten(1)), targets)

        def on_train_batch_end(self, *_):
            if self.global_step == step and len(self.seen) == step:
                self.trainer.save_checkpoint(tmp_path / "stopped.ckpt")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit(**options):
        names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", **dict.fromkeys(names, False))
        trainer.fit(model := Watching(), data.loader(16, augment="dsa", mix="cutmix"), **options)
        return model.seen

    whole, rest = fit(), fit(ckpt_path=tmp_path / "stopped.ckpt", weights_only=True)
    assert len(rest) == 21 - step
    assert all(torch.equal(one, two) for one, two in zip(whole[step:], rest, strict=True))


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize(
    ("example", "framework", "epochs"),
    [
        ("pytorch_loop", "torch", 25),
        ("lightning_fit", "lightning", 15),
        ("accelerate_loop", "accelerate", 15),
        ("transformers_trainer", "transformers", 12),
        ("timm_loader", "timm", 12),
        ("teaching", "matplotlib", 10),
        ("optuna_search", "optuna", 15),
    ],
)
def test_an_example_teaches_the_network(example, framework, epochs, labels, tmp_path, monkeypatch, capsys):
    pytest.importorskip(framework)
    path = ROOT / "tools" / "examples" / f"{example}.py"
    monkeypatch.chdir(ROOT)
    random.seed(0)  # timm's transforms draw from it
    output = ["--output", str(tmp_path)] if example == "teaching" else []
    trials = ["--trials", "3"] if example == "optuna_search" else []
    monkeypatch.setattr(
        sys, "argv", [str(path), "--labels", labels, "--epochs", str(epochs), *output, *trials]
    )
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert float(re.search(r"real ones: (\d+\.\d) %", printed)[1]) > 60
    if output:
        assert {file.name for file in tmp_path.iterdir()} - {"cache"} == {"images.png", "curves.png"}


def test_a_teacher_is_trained_once_and_labels_what_the_student_sees(tmp_path, monkeypatch, capsys):
    path, stored = ROOT / "tools" / "examples" / "teacher.py", tmp_path / "teacher.safetensors"
    monkeypatch.chdir(ROOT)
    written = []
    for epochs in ("12", "1"):
        monkeypatch.setattr(sys, "argv", [str(path), "--teacher", str(stored), "--epochs", epochs])
        runpy.run_path(str(path), run_name="__main__")
        written.append(stored.stat().st_mtime_ns)
    assert written[0] == written[1]
    accuracies = re.findall(r"real ones: (\d+\.\d) %", capsys.readouterr().out)[:2]
    assert len(accuracies) == 2
    assert min(map(float, accuracies)) > 60


def test_every_example_is_run_and_short():
    tested = {"pytorch_loop", "lightning_fit", "accelerate_loop", "transformers_trainer", "timm_loader"}
    assert {path.stem for path in EXAMPLES} == tested | {"teaching", "optuna_search", "teacher"}
    assert all(len(path.read_text().splitlines()) < 60 for path in EXAMPLES)


def test_ranks_of_accelerate_get_the_batches_of_one_process(data):
    shard = pytest.importorskip("accelerate.data_loader").BatchSamplerShard
    alone = list(data.dataloader(16, augment="color", mix="cutmix", seed=3))
    shared = []
    for rank in range(2):
        loader = data.dataloader(16, augment="color", mix="cutmix", seed=3)
        batches = shard(loader.batch_sampler, num_processes=2, process_index=rank, even_batches=False)
        shared.append([loader.dataset.__getitems__(indices) for indices in batches])
    merged = [shared[number % 2][number // 2] for number in range(len(alone))]
    for (images, targets), (others, other_targets) in zip(alone, merged, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(targets, other_targets)
