"""The store: images sorted by content in mapped files, whose every part can be checked."""

import dataclasses
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from artifacts import flip
from commands import ROOT
from photographs import CLASSES, photographs
from safetensors import safe_open
from safetensors.torch import load_file

from distilled_data.errors import IntegrityError, MissingExtraError, SourceError, UsageError
from ncfm_engine.config import DistillConfig
from ncfm_engine.distill import distill
from ncfm_engine.sampling import ClassSampler
from ncfm_engine.sources import Source, hold_out, load_source, store
from ncfm_engine.sources.export import to_webdataset
from ncfm_engine.sources.images import Images
from ncfm_engine.sources.prepare import prepare
from ncfm_engine.sources.reader import ArrayReader, Origin
from ncfm_engine.sources.source import digests_of, pixel_sums
from ncfm_engine.sources.store import INDEX_FILE, describe_store, open_store, read_index, verify_store

IMAGES, LABELS = photographs(10)
ORIGIN = Origin("photographs", "made:photographs", "1", "MIT", "@misc{x}")


def reader(images=IMAGES, labels=LABELS, **test) -> ArrayReader:
    return ArrayReader(ORIGIN, CLASSES, {"train": (images, labels)} | test, [len(images)], rows=7)


@pytest.fixture
def folder(tmp_path):
    prepare(reader(), tmp_path / "store", workers=0)
    return tmp_path / "store"


@pytest.fixture
def small_files(monkeypatch):
    """Five images in a file, two decoded and one sorted at once, which is larger than a block."""
    monkeypatch.setattr(store, "SHARD_BYTES", 5 * IMAGES[0].size)
    monkeypatch.setattr("ncfm_engine.sources.spool.BLOCK", 2 * IMAGES[0].size)
    monkeypatch.setattr("ncfm_engine.sources.sorting.BLOCK", IMAGES[0].size - 1)


def test_a_store_holds_all_images_sorted_by_class_and_content_with_an_index(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "index.json", "test-00000.safetensors", "train-00000.safetensors",
    ]  # fmt: skip
    index = json.loads((folder / INDEX_FILE).read_text())
    assert index["classes"] == list(CLASSES)
    assert index["shape"] == [3, 12, 12]
    assert index["counts"] == {"train": [8] * 4, "test": [2] * 4}
    assert (index["origin"]["license"], index["origin"]["id"]) == ("MIT", "made:photographs")
    train = load_file(folder / "train-00000.safetensors")
    assert train["images"].shape == (32, 3, 12, 12)
    digests = [hashlib.sha256(image.numpy().tobytes()).digest() for image in train["images"]]
    assert [row.numpy().tobytes() for row in train["digests"]] == digests
    for first in range(0, 32, 8):
        assert digests[first : first + 8] == sorted(digests[first : first + 8])


def test_mean_std_and_sums_are_those_of_the_pixels(folder):
    index, train = read_index(folder), load_file(folder / "train-00000.safetensors")
    pixels = train["images"].double() / 255
    assert index.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert index.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
    assert torch.equal(train["sums"][..., 1], train["images"].long().square().sum((2, 3)))


def test_images_are_mapped_and_not_read(folder):
    source = open_store(folder)
    with open("/proc/self/maps") as maps:
        assert str(folder / "train-00000.safetensors") in maps.read()
    assert source.train.images[3].data_ptr() == source.train.images.data_ptr() + 3 * IMAGES[0].size


def test_images_begin_at_a_page_and_whole_numbers_where_a_processor_wants_them(folder):
    source = open_store(folder)
    for part in (source.train, source.test):
        assert part.images.data_ptr() % 4096 == 0
    content = (folder / "train-00000.safetensors").read_bytes()
    assert (8 + int.from_bytes(content[:8], "little")) % 8 == 0


def test_several_files_are_the_same_source_as_one(folder, tmp_path, small_files):
    many = prepare(reader(), tmp_path / "many", workers=0)
    assert len(list((tmp_path / "many").glob("train-*"))) == 7
    one = open_store(folder)
    assert (many.fingerprint, many.mean, many.std) == (one.fingerprint, one.mean, one.std)
    assert torch.equal(many.train.images[:], one.train.images)
    rows = ClassSampler(one.train).draw(5, torch.Generator().manual_seed(0)).flatten()
    for order in (rows, rows.flip(0), rows[torch.randperm(len(rows))], rows[:0]):
        assert torch.equal(many.train.images.index_select(0, order), one.train.images[order])
        assert torch.equal(many.train.images[order], one.train.images[order])
    for row in (0, 4, 5, 31, -1):
        assert torch.equal(many.train.images[row], one.train.images[row])
    part = many.train.images.narrow(0, 3, 20)
    assert torch.equal(part[2:6], one.train.images[5:9])
    assert torch.equal(part[torch.tensor([7, 0])], one.train.images[torch.tensor([10, 3])])


def test_a_view_of_one_image_is_not_a_copy(folder, tmp_path, small_files, monkeypatch):
    images = prepare(reader(), tmp_path / "many", workers=0).train.images
    assert isinstance(images, Images)
    assert images[7].data_ptr() == images.parts[1][2].data_ptr()
    assert images.nbytes == sum(part.nbytes for part in images.parts)
    assert images.to("cpu") is images
    assert images.to("meta").device.type == "meta"
    monkeypatch.setattr("ncfm_engine.sources.images.BLOCK", 5 * images[0].numel())
    images.device = torch.device("meta")  # so that all are copied, as to a GPU
    assert torch.equal(images.to("cpu"), images[:])


def test_a_validation_split_reads_no_image_and_has_the_statistics_of_its_own(folder, monkeypatch):
    source = open_store(folder)
    monkeypatch.setattr(Images, "index_select", None)
    validation = hold_out(source, 0.25)
    monkeypatch.undo()
    pixels = torch.stack(list(validation.train.images)).double() / 255
    assert validation.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert validation.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
    assert validation.test.counts.tolist() == [2] * 4


def test_a_part_of_a_part_holds_the_images_it_should(folder, tmp_path, small_files):
    for source in (open_store(folder), prepare(reader(), tmp_path / "many", workers=0)):
        train = hold_out(source, 0.25).train
        expected = torch.stack(list(train.images))[5:15]
        part = train.images.narrow(0, 5, 10)
        assert torch.equal(part[:], expected)
        assert torch.equal(part[torch.tensor([9, 0])], expected[[9, 0]])
        assert torch.equal(part[3], expected[3])
        again = hold_out(hold_out(source, 0.25), 0.25).train
        assert {image.numpy().tobytes() for image in again.images} < {
            i.numpy().tobytes() for i in train.images
        }


def test_the_validation_split_follows_the_content_not_the_order_or_the_files(folder, tmp_path, small_files):
    order = np.random.default_rng(1).permutation(len(IMAGES))
    other = prepare(reader(IMAGES[order], LABELS[order]), tmp_path / "other", workers=0)
    found, expected = (hold_out(source, 0.25).test for source in (other, open_store(folder)))
    assert torch.equal(torch.stack(list(found.images)), torch.stack(list(expected.images)))


def test_distilling_from_several_files_or_a_part_of_them_gives_the_same_images(
    folder, tmp_path, small_files, pool, digits
):
    from ncfm_engine.config import NetworkConfig, PretrainConfig
    from ncfm_engine.pretrain import pretrain

    def distilled(source: Source) -> torch.Tensor:
        pool = pretrain(
            PretrainConfig(networks=2, epochs=1), NetworkConfig(width=8, depth=2), source, seed=0,
            device="cpu", cache=tmp_path / "cache",
        )  # fmt: skip
        config = DistillConfig(iterations=3, real_batch=5, frequencies=32, factor=1)
        return distill(config, source, pool, ipc=1, seed=0, device="cpu").images

    many = prepare(reader(), tmp_path / "many", workers=0)
    assert torch.equal(distilled(many), distilled(open_store(folder)))
    assert torch.equal(distilled(hold_out(many)), distilled(hold_out(open_store(folder))))


def test_a_store_is_written_and_read_where_the_system_tells_no_memory_and_takes_no_advice(
    tmp_path, monkeypatch
):
    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")  # as Pythons built for older Macs say

    monkeypatch.setattr(os, "sysconf", unknown)
    assert store._memory() == math.inf
    monkeypatch.delattr(os, "sysconf")  # as on Windows
    assert store._memory() == math.inf
    monkeypatch.delattr(mmap, "MADV_RANDOM")
    monkeypatch.setattr(store, "MEMORY", 0)
    prepare(reader(), tmp_path / "store", workers=0)
    assert verify_store(tmp_path / "store") == len(IMAGES)


def test_a_draw_reads_no_more_of_the_file_than_its_images_and_what_the_kernel_adds(tmp_path):
    prepare(reader(*photographs(100, side=64)), tmp_path / "store", workers=0)  # 4.9 MB
    program = """
import os, sys
from pathlib import Path
import torch
from ncfm_engine.sources import store
path = Path(sys.argv[1], "train-00000.safetensors")
with path.open("rb") as file:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # out of the page cache
def read():
    return int(Path("/proc/self/io").read_text().partition("read_bytes: ")[2].split()[0])
before = read()
store.MEMORY = 2**20  # the store is larger
images = store.open_store(sys.argv[1]).train.images
images.index_select(0, torch.tensor([3, 100, 200, 300]))
print(read() - before, images.nbytes)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    touched, whole = map(int, done.stdout.split())
    assert touched < 2**19 < whole // 4


# What is wrong with a store


def test_a_changed_pixel_is_found_by_verifying(folder):
    assert verify_store(folder) == 40
    flip(folder / "train-00000.safetensors", -5)
    with pytest.raises(IntegrityError, match="image 31 of train is not the one that was prepared"):
        verify_store(folder)


@pytest.mark.parametrize("name", ["images", "sums"])
def test_what_changed_places_is_found_by_verifying(folder, name):
    path = folder / "train-00000.safetensors"
    with safe_open(path, "np") as file:
        found = file.get_tensor(name)
    changed = found.copy()
    if name == "images":  # the sums of the image stay as they were
        changed[3] = found[3, :, ::-1]
    else:  # and those of the class
        changed[[3, 4]] = found[[4, 3]]
    path.write_bytes(path.read_bytes().replace(found.tobytes(), changed.tobytes()))
    assert open_store(folder).fingerprint == read_index(folder).fingerprint
    with pytest.raises(IntegrityError, match="image 3 of train is not the one that was prepared"):
        verify_store(folder)


def test_a_changed_digest_is_found_by_opening(folder):
    path = folder / "train-00000.safetensors"
    with safe_open(path, "np") as file:
        place = path.read_bytes().index(file.get_tensor("digests")[3].tobytes())
    flip(path, place)
    with pytest.raises(IntegrityError, match=r"the files make up .*; index\.json says "):
        open_store(folder)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_changed_statistic_is_found_by_opening(folder, name):
    index = json.loads((folder / INDEX_FILE).read_text())
    index[name][0] += 0.001
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match=r"index\.json says"):
        open_store(folder)


def test_counts_of_other_files_are_found_by_opening(folder):
    index = json.loads((folder / INDEX_FILE).read_text())
    index["counts"]["train"] = [1, 0, 0, 0]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(SourceError, match="counts of train that do not fit its classes and files"):
        open_store(folder)


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_cut_file_is_refused(folder, size):
    path = folder / "test-00000.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(IntegrityError, match=r"test-00000\.safetensors cannot be read"):
        open_store(folder)


def test_a_file_is_written_already_if_it_is_whole_and_of_these_images(tmp_path):
    path, images = tmp_path / "a.safetensors", np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))
    mirrored = images[..., ::-1]  # whose sums are the same
    sums, digests = pixel_sums(images), digests_of(images)
    store.write_shard(path, iter((images[:30], images[30:])), images.shape[1:], digests, sums)
    assert store.is_written(path, images.shape[1:], digests, sums)
    assert not store.is_written(path, images.shape[1:], digests_of(mirrored), pixel_sums(mirrored))
    assert not store.is_written(path, images.shape[1:], digests, sums + 1)
    os.truncate(path, path.stat().st_size - 1)
    assert not store.is_written(path, images.shape[1:], digests, sums)


def test_a_changed_header_is_refused(folder):
    path = folder / "train-00000.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"U8"', b'"I8"', 1))  # what others would read
    with pytest.raises(IntegrityError, match=r"train-00000\.safetensors cannot be read"):
        open_store(folder)


def test_a_missing_or_exchanged_file_is_refused(folder):
    shutil.copy(folder / "train-00000.safetensors", folder / "test-00000.safetensors")
    with pytest.raises(IntegrityError, match="does not hold 8 images"):
        open_store(folder)
    (folder / "test-00000.safetensors").unlink()
    with pytest.raises(IntegrityError, match="cannot be read"):
        open_store(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not the index of a store"),
        (b"[]", "is not the index of a store"),
        (b'"1"', "is not the index of a store"),
        (b'{"format_version": 2}', "format version 2, this package reads 1"),
        (b'{"format_version": 1, "classes": 3}', "is not the index of a store"),
        (b"[" * 100_000, "is not the index of a store"),
    ],
)
def test_an_index_that_is_none_is_refused(folder, content, message):
    (folder / INDEX_FILE).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        open_store(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("counts", {"train": [10**13] * 4, "test": [2] * 4}),  # 320 TB of targets
        ("counts", {"train": [33, -1, 0, 0], "test": [2] * 4}),
        ("counts", {"train": ["8"] * 4, "test": [2] * 4}),
        ("counts", {"train": [32], "test": [2] * 4}),
        ("shards", {"train": [32.0], "test": [8]}),
        ("shards", {"train": [], "test": [8]}),
        ("shards", {"train": [None], "test": [8]}),
        ("shape", [3, 12, "12"]),
        ("shape", [3, 0, 12]),
        ("classes", ["a", "b"]),
        ("classes", [1, 2, 3, 4]),
        ("origin", {"name": 1, "id": "made:photographs"}),
    ],
)
def test_an_index_of_other_sizes_than_the_files_have_is_refused_before_memory_is_taken(folder, name, value):
    index = json.loads((folder / INDEX_FILE).read_text())
    (folder / INDEX_FILE).write_text(json.dumps(index | {name: value}))
    with pytest.raises(SourceError, match="is not the index of a store: "):
        open_store(folder)


@pytest.mark.parametrize("name", ["counts", "shards"])
def test_an_index_without_a_part_is_refused_and_may_be_replaced(folder, name):
    expected, index = read_index(folder), json.loads((folder / INDEX_FILE).read_text())
    index[name]["trai~"] = index[name].pop("train")
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(SourceError, match="is not the index of a store: 'train'"):
        open_store(folder)
    prepare(reader(), folder, workers=0, overwrite=True)
    assert read_index(folder) == expected


def test_a_folder_without_an_index_is_no_store_and_neither_is_a_file(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"")
    for place in (tmp_path, tmp_path / "a.npz"):
        with pytest.raises(SourceError, match=r"has no index\.json\. Make one with prepare\.py"):
            load_source(f"store:{place}")


def test_a_store_is_a_source_that_takes_no_further_changes(folder):
    assert load_source(f"store:{folder}").fingerprint == read_index(folder).fingerprint
    changes = {"size": 8, "fit": "squash", "channels": 1, "data": "x", "classes": "x", "store": "x"}
    for name, value in (changes | {"label_column": "x"}).items():
        with pytest.raises(UsageError, match="is prepared already"):
            load_source(f"store:{folder}", **{name: value})


@pytest.mark.parametrize("name", [" cat", "cat\ndog", "cat\rdog", "cat\n"])
def test_names_that_do_not_fit_on_a_line_are_not_written_for_others(folder, tmp_path, name):
    source = open_store(folder)
    source = dataclasses.replace(source, classes=(name, *source.classes[1:]))
    alone = re.escape(f"the classes {name!r} cannot be named in classes.txt, one on a line")
    with pytest.raises(UsageError, match=alone):
        to_webdataset(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_description_says_what_people_ask_first(folder):
    prepare(reader(IMAGES[1:], LABELS[1:]), folder, workers=0, overwrite=True)
    text = describe_store(folder)
    for part in ("31 + 8 images of 3x12x12, 4 classes of 7 to 8", "MIT", read_index(folder).fingerprint):
        assert part in text
    assert "test         from 0.2 of each class" in text
    assert "left out" not in text
    assert f"classes      {', '.join(CLASSES)}\n" in text


# Out again


def test_shards_that_are_written_are_read_as_the_same_source(folder, tmp_path, monkeypatch):
    from ncfm_engine.sources import export

    monkeypatch.setattr(export, "SHARD_BYTES", 10 * IMAGES[0].size)
    monkeypatch.setattr("webdataset.writer.gopen", None)  # which takes a path with a drive for a URL
    source = open_store(folder)
    shards = to_webdataset(source, tmp_path / "shards")
    assert [path.name for path in shards] == [*(f"train-{n:05d}.tar" for n in range(4)), "test-00000.tar"]
    again = load_source(f"wds:{tmp_path}/shards/*.tar")
    assert (again.fingerprint, again.mean, again.std) == (source.fingerprint, source.mean, source.std)
    before = [path.read_bytes() for path in shards]
    assert [path.read_bytes() for path in to_webdataset(again, tmp_path / "again")] == before
    with pytest.raises(UsageError, match="not an empty folder"):
        to_webdataset(source, tmp_path / "shards")


def test_shards_that_were_not_written_to_the_end_are_written_again(folder, tmp_path, monkeypatch):
    from ncfm_engine.sources import export

    def interrupted(image):
        if next(images) == 15:  # of the second shard
            raise KeyboardInterrupt
        return png(image)

    images, before = itertools.count(), {path.name for path in tmp_path.iterdir()}
    png = export.to_png
    monkeypatch.setattr(export, "SHARD_BYTES", 10 * IMAGES[0].size)
    monkeypatch.setattr(export, "to_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_webdataset(open_store(folder), tmp_path / "shards")
    assert {path.name for path in tmp_path.iterdir()} == before
    monkeypatch.setattr(export, "to_png", png)
    to_webdataset(open_store(folder), tmp_path / "shards")
    assert len(list((tmp_path / "shards").iterdir())) == 6


@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_itself_reads_them(folder, tmp_path):
    import webdataset

    source = open_store(folder)
    [train, _] = to_webdataset(source, tmp_path / "shards")
    data = webdataset.WebDataset(str(train), shardshuffle=False).decode("rgb8").to_tuple("png", "cls")
    for (image, label), expected, target in zip(data, source.train.images, source.train.targets, strict=True):
        assert label == target
        np.testing.assert_array_equal(image.transpose(2, 0, 1), expected.numpy())


def test_a_missing_package_names_the_extra(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.writer", None)
    with pytest.raises(MissingExtraError, match=r"'webdataset'"):
        to_webdataset(open_store(folder), tmp_path / "shards")
