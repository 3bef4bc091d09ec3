"""The benchmark of feeding, in small: every contender does the work, and every way of ours trains alike."""

import importlib

import pytest
import torch
from commands import ROOT
from torch import nn

from distilled_data import DistilledDataset, soft_cross_entropy
from ncfm_engine.networks import build_network


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module("benchmark_feeding")


@pytest.fixture(scope="module")
def feeds():
    return importlib.import_module("tools.benchmark.feeds")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of webdataset
def test_every_contender_feeds_every_image_once_with_its_class(feeds, tmp_path):
    images = torch.arange(40, dtype=torch.uint8).mul(6).view(4, 10, 1, 1, 1).expand(4, 10, 3, 16, 16)
    data = DistilledDataset.from_tensors(
        images.contiguous(), [str(n) for n in range(10)], mean=[0.0] * 3, std=[1 / 255] * 3, labels="hard"
    )
    contenders = feeds.feeds(data, 8, tmp_path, workers=0)
    assert len(contenders) == 8
    for name, feed in contenders.items():
        values, numbers = [], []
        for batch in feed:
            pixels, targets = batch.values() if isinstance(batch, dict) else batch
            values += pixels[:, :, 6:10, 6:10].mean((1, 2, 3)).round().long().tolist()  # no border gets there
            numbers += torch.as_tensor(targets).tolist()
        assert sorted(values) == [6 * number for number in range(40)], name
        if "webdataset" not in name:  # whose two halves number their classes anew
            assert all(value // 6 % 10 == number for value, number in zip(values, numbers, strict=True)), name


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of webdataset
def test_images_that_fill_no_class_are_left_out_of_an_epoch(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "fresh", lambda code, *arguments: lambda: (1.0, 1))
    benchmark.main(benchmark.parser().parse_args(["--images", "25", "--workers", "0", "--rounds", "1"]))
    assert "1.00  DataLoader" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "most"), [("from_folder alone", 1.1), ("from_folder and first batch", 1.2)], ids=["set", "batch"]
)
def test_a_fresh_process_reports_seconds_and_bytes(benchmark, tmp_path, what, most):
    benchmark.write_random_set(tmp_path, 5000, 32, 100, 1)
    code = benchmark.START + benchmark.COLD[what] + benchmark.MEASURE
    seconds, memory = benchmark.fresh(code, str(tmp_path))()
    assert 0 < seconds < 60
    batch = 4 * 256 * 3 * 32 * 32 if "batch" in what else 0  # at most: it may lie in what imports have freed
    assert 15e6 < memory < most * 15.4e6 + batch  # one copy of the artifact


def test_training_is_timed_and_ratios_are_to_the_first(benchmark, feeds, capsys):
    contenders = benchmark.training(feeds.random_set(100, 32), 20, "cpu", steps=2, width=4)
    rows = benchmark.report("two steps", benchmark.turns(contenders, 2))
    assert [len(row["seconds"]) for row in rows] == [2, 2, 2]
    assert "1.00  one batch, again and again" in capsys.readouterr().out


def test_a_convnet_learns_the_same_from_loader_and_dataloader_and_in_lightning():
    lightning = pytest.importorskip("lightning")
    data = DistilledDataset.from_folder(ROOT / "tools" / "results" / "digits" / "digits-ipc10")
    options = {"augment": "dsa", "mix": "cutmix|none", "seed": 5}

    class Module(lightning.LightningModule):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.network = network

        def training_step(self, batch, index):
            return soft_cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    def by_hand(batches) -> nn.Module:
        module = Module(build_network("convnet", channels=1, size=8, classes=10, width=8, seed=3))
        optimiser = module.configure_optimizers()
        for _ in range(4):
            for index, batch in enumerate(batches):
                optimiser.zero_grad()
                module.training_step(batch, index).backward()
                optimiser.step()
        return module

    def by_lightning(batches) -> nn.Module:
        module = Module(build_network("convnet", channels=1, size=8, classes=10, width=8, seed=3))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        lightning.Trainer(max_epochs=4, accelerator="cpu", enable_model_summary=False, **quiet).fit(
            module, batches
        )
        return module

    expected = nn.utils.parameters_to_vector(by_hand(data.loader(32, **options)).parameters())
    for module in (
        by_hand(data.dataloader(32, **options)),
        by_lightning(data.loader(32, **options)),
        by_lightning(data.dataloader(32, **options)),
    ):
        assert torch.equal(nn.utils.parameters_to_vector(module.parameters()), expected)
