"""Sets and loaders are on the CPU, and float32, whatever torch's defaults are."""

import contextlib

import numpy as np
import pytest
import torch
from artifacts import make_artifact

from distilled_data import DistilledDataset, soft_cross_entropy
from distilled_data import decode as module
from distilled_data.format import ARTIFACT_FILE, write_artifact
from distilled_data.interchange import read_set, write_set
from distilled_data.manifest import write_manifest


@contextlib.contextmanager
def another_device():
    torch.set_default_device("meta")  # as "cuda" is where there is a GPU, but without numbers
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def another_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def everything(folder, out):
    """Tensors that came out of every door."""
    data = DistilledDataset.from_folder(folder)
    hard = data.with_labels("hard")
    yield from (*data[3], *data[:5], *hard[[1, 2]], *data[np.zeros(len(data), bool)])
    yield from (data.images, data.soft_targets, *data.select(1)[0], *data.split(0.5)[1][0])
    for options in ({"augment": "dsa"}, {"mix": "cutmix"}, {"mix": "mixup"}, {"shuffle": False}):
        yield from next(iter(data.loader(8, **options)))
        yield from next(iter(hard.loader(8, **options)))
    yield from data.dataloader(8, augment="color_crop").dataset.__getitems__([*range(8)])  # type: ignore[attr-defined]
    yield soft_cross_entropy(torch.zeros(5, 10, device="cpu", dtype=torch.float32), data[:5][1])
    images = data.data.transpose(0, 3, 1, 2)
    again = DistilledDataset.from_tensors(images, targets=data.targets.numpy(), mean=[0.1], std=[0.2])
    yield from (*again[0], again.soft_targets)
    for name in ("a.npz", "a.pt", "images_a.pt", "folders"):
        write_set(hard, out / name)
    yield read_set(out / "a.npz").images
    for part in ({"ipc": 1}, {"classes": [3, 1]}):
        some = DistilledDataset.from_folder(folder, **part)
        yield from (some.artifact.images, some.artifact.logits, *some[0])
    data.verify()


@pytest.mark.parametrize("other", [another_device, another_dtype])
def test_another_default_changes_nothing(other, tmp_path):
    folder = tmp_path / "set"
    write_artifact(folder / ARTIFACT_FILE, make_artifact(2))
    write_manifest(folder)
    usual = list(everything(folder, tmp_path / "usual"))
    module._weights.cache_clear()
    with other():
        found = list(everything(folder, tmp_path / "other"))
    assert all(tensor.device.type == "cpu" for tensor in found)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in usual]
    assert [torch.equal(*pair) for pair in zip(found, usual, strict=True)] == [True] * len(usual)
