"""Exports: what other libraries read back is what `DistilledDataset` decodes."""

import dataclasses
import importlib
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from artifacts import make_artifact

from distilled_data import DistilledDataset, MissingExtraError, OutputError, UsageError, export
from distilled_data.format import FOLDER_FILES, PARQUET_FILE
from hub import complete_folder


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def data(request):
    return DistilledDataset(make_artifact(2, channels=request.param))


def pixels(image):
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)


def test_a_folder_is_the_set_again_and_can_be_completed_for_publishing(data, tmp_path):
    part = data.select(ipc=1, classes=data.classes[1:3])
    part.to_folder(tmp_path / "part")
    again = DistilledDataset.from_folder(tmp_path / "part")
    assert (again.info, again.content_hash) == (part.info, part.content_hash)
    assert torch.equal(again.images, part.images)
    assert torch.equal(again.soft_targets, part.soft_targets)
    again.verify()
    with pytest.raises(UsageError, match="is not an empty folder"):
        data.to_folder(tmp_path / "part")
    complete_folder(tmp_path / "part")
    assert {path.name for path in (tmp_path / "part").iterdir()} == {"data", *FOLDER_FILES} - {PARQUET_FILE}
    assert DistilledDataset.from_folder(tmp_path / "part").content_hash == part.content_hash


def test_a_folder_has_the_results_of_its_own_images_and_of_the_first_of_them_alone(data, tmp_path):
    first, all_but_one = data.select(ipc=1), data.select(classes=data.classes[1:])
    rows = [{"content_hash": of.content_hash, "ipc": of.ipc} for of in (first, data, all_but_one)]
    info = dataclasses.replace(data.info, results=tuple(rows))
    measured = DistilledDataset(dataclasses.replace(data.artifact, metadata=info))
    parts = {"whole": measured, "first": measured.select(ipc=1), "few": measured.select(classes=[0, 1])}
    for name, part in parts.items():
        part.to_folder(tmp_path / name)
    found = {name: list(DistilledDataset.from_folder(tmp_path / name).info.results) for name in parts}
    assert found == {"whole": rows[:2], "first": rows[:1], "few": []}


def test_a_hugging_face_dataset_has_images_names_and_soft_labels(data):
    rows = data.to_hf()
    assert torch.equal(torch.stack([pixels(image) for image in rows["image"]]), data.images)
    assert rows["label"][:] == data.targets.tolist()
    assert rows.features["label"].names == list(data.classes)
    assert torch.allclose(torch.tensor(rows["soft_label"][:]), data.soft_targets)


def test_soft_labels_of_many_classes_become_no_numbers_of_python(data):
    data.to_hf()  # imports
    count = 500
    images = torch.zeros(1, count, 1, 2, 2, dtype=torch.uint8)
    many = DistilledDataset.from_tensors(images, logits=torch.zeros(1, count, count), mean=[0.5], std=[0.5])
    tracemalloc.start()
    many.to_hf()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * count**2  # what a float and the place in the list that names it take


@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_shard_is_read_back_by_webdataset_and_is_the_same_bytes_twice(data, tmp_path, monkeypatch):
    webdataset = importlib.import_module("webdataset")
    for name in ("a.tar", "b.tar"):
        data.to_webdataset(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webdataset.writer.gopen", None)  # which takes a path with a drive for a URL
    data.to_webdataset("x:y/z/a.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "x:y" / "z" / "a.tar").read_bytes()
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode("pil"))
    images = torch.stack([pixels(sample["png"])[: data.info.channels] for sample in samples])
    assert torch.equal(images, data.images)
    assert [sample["cls"] for sample in samples] == data.targets.tolist()
    assert np.allclose(np.stack([sample["soft.npy"] for sample in samples]), data.soft_targets.numpy())


def test_torchvision_reads_the_folders_in_label_order(data, tmp_path):
    data.to_imagefolder(tmp_path / "out")
    found = torchvision.datasets.ImageFolder(str(tmp_path / "out"))
    assert found.classes == [f"{label}_{name}" for label, name in enumerate(data.classes)]
    order = data.targets.argsort(stable=True)
    assert found.targets == data.targets[order].tolist()
    grey = data.info.channels == 1
    images = torch.stack([pixels(image.convert("L") if grey else image) for image, _ in found])
    assert torch.equal(images, data.images[order])


def test_class_names_make_no_paths(tmp_path):
    classes = [
        "../up",
        "a/b",
        "/root",
        "..",
        *(f"class {i}" for i in range(6)),
        "long" * 80,
        "\U00020000" * 90,
    ]
    DistilledDataset(make_artifact(1, classes=classes)).to_imagefolder(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[:4] == [
        "00__up",
        "01_a_b",
        "02__root",
        "03__",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_holds_something_is_left_alone(data, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder"):
        data.to_imagefolder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_cannot_be_written_is_said_and_nothing_is_left(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        data.to_webdataset(tmp_path / "file" / "a.tar")
    with pytest.raises(OutputError, match="too long"):
        data.to_webdataset(tmp_path / ("a" * 300 + ".tar"))
    with pytest.raises(OutputError):
        data.to_imagefolder(tmp_path / "file" / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_there_is_not_written_over(data, tmp_path):
    (tmp_path / "a.tar").write_text("mine")
    with pytest.raises(UsageError, match=r"a\.tar is there already; choose another name, or remove it"):
        data.to_webdataset(tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_text() == "mine"


def test_an_interrupted_export_leaves_nothing(data, tmp_path, monkeypatch):
    def interrupt(image):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "to_pil", interrupt)
    for write, name in ((data.to_webdataset, "a.tar"), (data.to_imagefolder, "b")):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_shard_is_not_called_compressed(data, tmp_path):
    with pytest.raises(UsageError, match=r"name it \.tar, got a\.tar\.gz"):
        data.to_webdataset(tmp_path / "a.tar.gz")


def test_the_folder_one_is_in_may_be_written_while_it_is_empty(data, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    data.to_imagefolder(".")
    assert len(list((tmp_path / "out").iterdir())) == 10


def test_an_export_decodes_part_by_part(data, tmp_path, monkeypatch):
    sizes, decoded = [], data.decoded

    def counted(rows):
        sizes.append(len(rows))
        return decoded(rows)

    monkeypatch.setattr(export, "AT_ONCE", 7)
    monkeypatch.setattr(data, "decoded", counted)
    data.to_imagefolder(tmp_path / "out")
    assert (sum(sizes), max(sizes)) == (len(data), 7)


@pytest.mark.parametrize(
    ("package", "method"), [("datasets", "to_hf"), ("webdataset.writer", "to_webdataset")]
)
def test_a_missing_package_is_named_with_what_brings_it(data, tmp_path, monkeypatch, package, method):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingExtraError, match=package.split(".")[0]):
        getattr(data, method)(*([tmp_path / "x"] if method == "to_webdataset" else []))


def test_a_package_that_is_there_and_broken_is_not_said_to_be_missing(data, tmp_path, monkeypatch):
    (tmp_path / "datasets.py").write_text("raise ImportError('it takes another numpy')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "datasets", raising=False)
    with pytest.raises(
        MissingExtraError, match=r"which cannot be imported \(it takes another numpy\)\. Install"
    ):
        data.to_hf()


def test_without_teacher_labels_there_are_no_soft_ones(tmp_path):
    data = DistilledDataset(dataclasses.replace(make_artifact(1), logits=None))
    assert data.to_hf().column_names == ["image", "label"]
    data.to_webdataset(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as shard:
        assert {Path(name).suffix for name in shard.getnames()} == {".png", ".cls"}
