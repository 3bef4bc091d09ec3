"""Making a store: the same from every source, after every kill, by any number of processes."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from children import finish, is_alive, run_apart, run_in_a_session, start
from commands import ROOT, called
from filelock import FileLock
from interruptions import StopAfter, be_killed_by_the_workers, full_disk, prepare_on_a_full_disk
from photographs import CLASSES, encoded, photographs, pixels_of, write_folder, write_shards, write_tar
from PIL import Image

from distilled_data import DistilledDataset, UsageError
from distilled_data.errors import IntegrityError, OutputError, SourceError
from ncfm_engine.config import DistillConfig, NetworkConfig, PretrainConfig
from ncfm_engine.distill import distill
from ncfm_engine.pretrain import pretrain
from ncfm_engine.sources import load_source, spread, store
from ncfm_engine.sources.decode import Decoder
from ncfm_engine.sources.folder import FolderReader
from ncfm_engine.sources.prepare import LOCK_FILE, WORK_FOLDER, _finish, prepare
from ncfm_engine.sources.reader import ArrayReader, Origin
from ncfm_engine.sources.shards import ShardReader
from ncfm_engine.sources.spool import Spool
from ncfm_engine.sources.store import INDEX_FILE, describe_store, open_store, read_index
from ncfm_engine.stop import Stopped, StopRequest

IMAGES, LABELS = photographs(20)
COMMAND = [str(ROOT / "tools" / "prepare.py")]


def content(folder: Path) -> dict[str, bytes]:
    """All that a store consists of, but where it comes from."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    return files | {"fingerprint": read_index(folder).fingerprint.encode()}


@pytest.fixture
def shards(tmp_path) -> str:
    return f"{write_shards(tmp_path / 'shards', IMAGES, LABELS, shards=8)}/*.tar"


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Processes are started even for the little that there is."""
    monkeypatch.setattr(spread, "START", {})
    monkeypatch.setattr(spread, "ELSE", 0.0)


@pytest.fixture
def small_files(monkeypatch):
    """Twenty images in a file, three at once, of thirty files in a unit."""
    monkeypatch.setattr("ncfm_engine.sources.folder.FILES", 30)
    monkeypatch.setattr(store, "SHARD_BYTES", 20 * IMAGES[0].size)
    monkeypatch.setattr("ncfm_engine.sources.sorting.BLOCK", 3 * IMAGES[0].size)


@pytest.mark.filterwarnings("ignore:10 of the 10 classes have fewer training images than the 4 tiles of each")
def test_the_same_images_from_five_kinds_of_sources_are_distilled_to_the_same_bytes(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    images, labels = photographs(6, side=32)  # CIFAR-10 has ten classes of this size
    names = [*CLASSES, *(f"other {i}" for i in range(6))]
    labels = np.concatenate([labels, np.arange(4, 10).repeat(3)])
    images = np.concatenate([images, images[:18, ::-1]])
    of_class = np.array([(labels[:row] == label).sum() for row, label in enumerate(labels)])
    train, test = of_class % 2 == 0, of_class % 2 == 1
    batches = tmp_path / "data" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for name, rows in (("data_batch_1", train), ("test_batch", test)):
        flat = images[rows].transpose(0, 3, 1, 2).reshape(-1, 3072)
        (batches / name).write_bytes(pickle.dumps({"data": flat, "labels": labels[rows].tolist()}))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": None})

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    (tmp_path / "hf").mkdir()
    (tmp_path / "wds").mkdir()
    for part, rows in (("train", train), ("test", test)):
        columns = {
            "image": [Image.fromarray(image) for image in images[rows]],
            "label": labels[rows].tolist(),
        }
        datasets.Dataset.from_dict(columns, features=features).to_parquet(
            str(tmp_path / "hf" / f"{part}.parquet")
        )
        write_shards(tmp_path / "wds", images[rows], labels[rows], shards=2, part=part)
        for row, (image, label) in enumerate(zip(images[rows], labels[rows], strict=True)):
            path = tmp_path / "folder" / part / names[label] / f"{97 * row % 101}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(image))
    (tmp_path / "wds" / "classes.txt").write_text("\n".join(names))
    np.savez(
        tmp_path / "all.npz", x_train=images[train], y_train=labels[train], x_test=images[test],
        y_test=labels[test], classes=np.array(names),
    )  # fmt: skip

    sources = [load_source("cifar10", data=tmp_path / "data", workers=0)]
    sources += [
        load_source(f"{kind}:{tmp_path}/{place}", workers=0)
        for kind, place in (("hf", "hf"), ("wds", "wds/*.tar"), ("folder", "folder"), ("npz", "all.npz"))
    ]
    assert {source.origin.id.partition(":")[0] for source in sources} == {
        "torchvision", "hf", "wds", "folder", "npz",
    }  # fmt: skip
    found = []
    for source in sources:
        network = NetworkConfig(width=8, depth=2)
        options = {"seed": 0, "device": "cpu"}
        pool = pretrain(
            PretrainConfig(networks=2, epochs=1), network, source, cache=tmp_path / "pool", **options
        )
        config = DistillConfig(iterations=2, real_batch=5, frequencies=16)
        quantised = distill(config, source, pool, ipc=1, **options).quantised()
        found.append((source.fingerprint, source.mean, source.std, quantised.numpy().tobytes()))
    assert len(set(found)) == 1


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_the_number_of_processes_and_the_order_of_images_change_nothing(
    tmp_path, shards, small_files, workers
):
    prepare(ShardReader(shards), tmp_path / "expected", workers=0)
    other = write_folder(tmp_path / "folder", IMAGES[::-1], LABELS[::-1])
    prepare(FolderReader(other), tmp_path / "store", workers=workers)
    expected = content(tmp_path / "expected")
    assert len(expected) == 6
    assert content(tmp_path / "store") == expected


def slowly(number):
    time.sleep(0.1)
    return number


def wrongly(number):
    if slowly(number):
        raise RuntimeError("a fault of ours")


def test_processes_are_started_after_as_long_as_that_takes(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(spread, "DataLoader", None)
    monkeypatch.setattr(spread, "ELSE", 60.0)
    assert len(prepare(ShardReader(shards), tmp_path / "store", workers=2).train) == 64
    monkeypatch.setattr(spread, "ELSE", 0.0)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        list(spread.spread(abs, [-1, 2], workers=2))
    assert list(spread.spread(abs, [-1], workers=2)) == [1]
    monkeypatch.undo()
    monkeypatch.setattr(spread, "START", {})
    monkeypatch.setattr(spread, "ELSE", 0.05)
    assert sorted(spread.spread(slowly, range(4), workers=2)) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="a fault of ours"):  # and not called a process that was killed
        list(spread.spread(wrongly, range(4), workers=2))
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked up as Linux shows them")
def test_workers_end_if_the_process_that_started_them_is_killed_at_once(tmp_path):
    process = start(be_killed_by_the_workers, tmp_path)
    assert finish(process) == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while left := [pid for path in tmp_path.iterdir() if is_alive(pid := int(path.name))]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"the workers {left} wait for ever")
        time.sleep(0.01)
    assert list(tmp_path.iterdir())


def test_processes_that_torchrun_started_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    for others, workers in ((None, 12), ("1", 12), ("5", 2), ("24", 1)):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if others:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", others)
        assert spread.default_workers() == workers


def test_a_store_that_is_there_is_opened_and_not_made_again(tmp_path, shards, monkeypatch):
    first = prepare(ShardReader(shards), tmp_path / "store", workers=0)
    monkeypatch.setattr(Decoder, "__call__", None)
    assert prepare(ShardReader(shards), tmp_path / "store", workers=0).fingerprint == first.fingerprint


def test_a_store_whose_images_would_be_read_otherwise_today_is_not_taken(tmp_path, shards, monkeypatch):
    prepare(ShardReader(shards), tmp_path / "store")
    monkeypatch.setattr("ncfm_engine.sources.spool.REVISION", 10**6)
    with pytest.raises(OutputError, match="of the same prepared in another way"):
        prepare(ShardReader(shards), tmp_path / "store")


def test_what_is_read_without_a_store_is_kept_in_the_cache(tmp_path, shards, monkeypatch):
    first = load_source(f"wds:{shards}", workers=0)
    [made] = (tmp_path / "cache" / "distilled-data" / "stores").iterdir()
    assert made.name.startswith("shards-")
    monkeypatch.setattr(Decoder, "__call__", None)
    assert load_source(f"wds:{shards}").fingerprint == first.fingerprint


def test_a_source_that_changed_is_prepared_again_and_only_what_changed_is_decoded(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "folder", IMAGES, LABELS)
    first = load_source(f"folder:{folder}", workers=0)
    (folder / "leaf" / "new.png").write_bytes(encoded(IMAGES[0] // 2))
    second = load_source(f"folder:{folder}", workers=0)
    assert len(second.train) + len(second.test) == len(IMAGES) + 1
    assert second.fingerprint != first.fingerprint
    assert len(list((tmp_path / "cache" / "distilled-data" / "stores").iterdir())) == 1


def test_progress_is_told_in_units_and_files_with_the_images_decoded_in_a_second(tmp_path, shards):
    told = []
    with pytest.raises(Stopped):
        prepare(ShardReader(shards), tmp_path / "store", workers=0, stop=StopAfter(1))
    prepare(
        ShardReader(shards), tmp_path / "store", workers=0,
        report=lambda *place, **rate: told.append((*place, *rate)),
    )  # fmt: skip
    decoded = [("decode", done, 8, "images_per_second") for done in range(3, 9)]
    assert told == [*decoded, ("sort", 1, 2), ("sort", 2, 2)]


def test_a_store_of_other_data_is_replaced_only_if_asked(tmp_path, shards):
    first = prepare(ShardReader(shards), tmp_path / "store", workers=0)
    with pytest.raises(
        OutputError, match="holds a store of other data, or of the same prepared in another way"
    ):
        prepare(ShardReader(shards), tmp_path / "store", workers=0, decoder=Decoder(8))
    assert open_store(tmp_path / "store").fingerprint == first.fingerprint
    found = prepare(ShardReader(shards), tmp_path / "store", workers=0, decoder=Decoder(8), overwrite=True)
    assert found.train.images.shape[1:] == (3, 8, 8)
    assert read_index(tmp_path / "store").decoder == {"size": 8, "fit": "crop", "channels": None}


def test_a_store_is_kept_until_what_replaces_it_is_on_the_disk(tmp_path, shards, small_files, monkeypatch):
    prepare(ShardReader(shards), tmp_path / "store", workers=0)
    before = content(tmp_path / "store")
    other = write_shards(tmp_path / "other", 255 - IMAGES, LABELS, shards=8)
    reader, options = ShardReader(f"{other}/*.tar"), {"workers": 0, "overwrite": True}
    with pytest.raises(Stopped, match="2 of 8 units decoded"):
        prepare(reader, tmp_path / "store", stop=StopAfter(1), **options)
    assert content(tmp_path / "store") == before
    (other / "train-bad.tar").write_bytes(b"")
    with pytest.raises(SourceError, match=r"1 of 81 images cannot be used: train-bad\.tar"):
        prepare(ShardReader(f"{other}/*.tar"), tmp_path / "store", **options)
    assert content(tmp_path / "store") == before
    with pytest.raises(Stopped, match="2 of 5 files written"):
        prepare(reader, tmp_path / "store", stop=StopAfter(1), **options)
    assert content(tmp_path / "store") == before
    with full_disk(15 * IMAGES[0].size), pytest.raises(OutputError, match="what was done stays"):
        prepare(reader, tmp_path / "store", **options)
    assert content(tmp_path / "store") == before
    with monkeypatch.context() as patch:
        patch.setattr("ncfm_engine.sources.prepare.move", None)  # as good as a kill
        with pytest.raises(TypeError):
            prepare(reader, tmp_path / "store", **options)
    prepare(reader, tmp_path / "store", workers=0)  # now there is nothing left to overwrite
    prepare(reader, tmp_path / "expected", workers=0)
    assert content(tmp_path / "store") == content(tmp_path / "expected")


def test_a_damaged_store_is_replaced_if_asked_and_nothing_else_in_its_folder(tmp_path, shards):
    prepare(ShardReader(shards), tmp_path / "store", workers=0)
    expected = content(tmp_path / "store")
    path = tmp_path / "store" / "train-00000.safetensors"
    (tmp_path / "store" / "train-lora.safetensors").write_text("mine")
    index = tmp_path / "store" / INDEX_FILE
    changed = expected[path.name][:-1] + bytes([expected[path.name][-1] ^ 1])  # a pixel
    for damage in (
        lambda: path.unlink(),
        lambda: path.write_bytes(b"x"),
        lambda: index.write_text("{}") and path.write_bytes(changed),
    ):
        damage()
        with pytest.raises((IntegrityError, SourceError), match=r"Remove the folder and prepare it again"):
            prepare(ShardReader(shards), tmp_path / "store", workers=0)
        prepare(ShardReader(shards), tmp_path / "store", workers=0, overwrite=True)
        assert (tmp_path / "store" / "train-lora.safetensors").read_text() == "mine"
        assert content(tmp_path / "store") == expected | {"train-lora.safetensors": b"mine"}


def test_the_cache_does_not_depend_on_where_a_source_is_named_from(tmp_path, shards, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = load_source("wds:shards/*.tar", workers=0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_source("wds:../shards/*.tar", workers=0).fingerprint == first.fingerprint
    assert load_source(f"wds:{shards}", workers=0).fingerprint == first.fingerprint
    assert len(list((tmp_path / "cache" / "distilled-data" / "stores").iterdir())) == 1
    write_shards(tmp_path / "shards", IMAGES, LABELS, shards=1, part="all")
    for place in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(place)
        load_source(f"wds:pipe:cat {tmp_path}/shards/all-00000.tar", workers=0)
        load_source("digits", workers=0)
    assert len(list((tmp_path / "cache" / "distilled-data" / "stores").iterdir())) == 3


def test_a_test_split_without_a_usable_image_is_not_replaced_by_a_part_of_train(tmp_path, shards):
    write_shards(tmp_path / "shards", IMAGES[:4], LABELS[:4] + 100, shards=1, part="test")
    with pytest.raises(SourceError, match="has no usable test image of 4 of its 4 classes"):
        prepare(ShardReader(shards), tmp_path / "store", workers=0, skip_damaged=True)


def test_who_waits_for_another_process_hears_a_stop(tmp_path, shards):
    (tmp_path / "store").mkdir()
    stop = StopAfter(1)
    with (
        FileLock(tmp_path / "store" / LOCK_FILE),
        pytest.warns(UserWarning, match="prepare .*store, waiting for another process"),
        pytest.raises(Stopped, match="waiting for another process"),
    ):
        prepare(ShardReader(shards), tmp_path / "store", workers=0, stop=stop)
    assert stop.asked == 2  # so it waited
    assert len(prepare(ShardReader(shards), tmp_path / "store", workers=0).train) == 64


def test_a_finished_store_is_read_without_a_lock_and_no_other(tmp_path, shards):
    store = tmp_path / "store"

    def read(**arguments):
        with FileLock(store / LOCK_FILE):  # as good as a folder where none can be made
            return prepare(ShardReader(shards), store, workers=0, stop=StopRequest(0), **arguments)

    first = prepare(ShardReader(shards), store, workers=0)
    assert read().fingerprint == read(overwrite=True).fingerprint == first.fingerprint
    with pytest.raises(Stopped, match="waiting"):
        read(decoder=Decoder(8), overwrite=True)
    (store / WORK_FOLDER).mkdir()  # another process is about to finish it, or to replace it
    with pytest.raises(Stopped, match="waiting"):
        read()
    (store / WORK_FOLDER).rmdir()
    os.truncate(next(store.glob("train-*")), 5000)
    with pytest.raises(Stopped, match="waiting"):
        read()


def test_a_store_that_is_replaced_while_it_is_opened_is_made_again(tmp_path, shards, monkeypatch):
    other = f"{write_shards(tmp_path / 'other', 255 - IMAGES, LABELS, shards=8)}/*.tar"
    first, replaced = prepare(ShardReader(shards), tmp_path / "store", workers=0), []

    def replaced_then(folder):
        index = read_index(folder)
        if not replaced:
            replaced.append(True)
            prepare(ShardReader(other), folder, workers=0, overwrite=True)
        return index

    monkeypatch.setattr("ncfm_engine.sources.prepare.read_index", replaced_then)
    again = prepare(ShardReader(shards), tmp_path / "store", workers=0, overwrite=True)
    assert again.fingerprint == open_store(tmp_path / "store").fingerprint == first.fingerprint
    assert replaced


@pytest.mark.parametrize(("after", "stopped"), [(4, "5 of 8 units decoded"), (11, "4 of 5 files written")])
def test_an_interrupted_store_of_one_source_is_not_finished_with_the_images_of_another(
    tmp_path, shards, small_files, after, stopped
):
    with pytest.raises(Stopped, match=stopped):
        prepare(ShardReader(shards), tmp_path / "store", workers=0, stop=StopAfter(after))
    other = f"{write_shards(tmp_path / 'other', 255 - IMAGES[:40], LABELS[:40], shards=8)}/*.tar"
    prepare(ShardReader(other), tmp_path / "expected", workers=0)
    prepare(ShardReader(other), tmp_path / "store", workers=0)
    assert content(tmp_path / "store") == content(tmp_path / "expected")


def test_the_same_units_of_another_source_are_decoded_again(tmp_path):
    for name in ("one", "other"):
        images = IMAGES if name == "one" else 255 - IMAGES
        made = ArrayReader(Origin(name, name), CLASSES, {"train": (images, LABELS)}, "stamp", rows=10)
        if name == "one":
            with pytest.raises(Stopped):
                prepare(made, tmp_path / "store", workers=0, stop=StopAfter(4))
    found = pixels_of(prepare(made, tmp_path / "store", workers=0))
    assert set(found) == {i.transpose(2, 0, 1).tobytes() for i in images}


def test_a_store_that_another_process_replaced_meanwhile_is_not_taken(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(
        "ncfm_engine.sources.prepare._finish",
        lambda plan, *rest: _finish(dataclasses.replace(plan, seed=1), *rest),
    )
    with pytest.raises(SourceError, match="was replaced by another process"):
        prepare(ShardReader(shards), tmp_path / "store", workers=0)


def test_decoded_pixels_that_are_cut_make_no_store(tmp_path, shards, small_files):
    with pytest.raises(Stopped, match="1 of 5 files written"):
        prepare(ShardReader(shards), tmp_path / "store", workers=0, stop=StopAfter(8))
    for path in (tmp_path / "store" / WORK_FOLDER).glob("*.pixels"):
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(SourceError, match=r"\.pixels is too short\. Remove that file's folder"):
        prepare(ShardReader(shards), tmp_path / "store", workers=0)
    assert not (tmp_path / "store" / INDEX_FILE).exists()


def test_what_was_decoded_and_is_damaged_or_gone_is_named_with_what_to_do(tmp_path, shards):
    with pytest.raises(OutputError, match=r"gone was decoded, but is not there .*All processes must share"):
        Spool.read(tmp_path / "gone")
    with pytest.raises(Stopped):
        prepare(ShardReader(shards), tmp_path / "store", workers=0, stop=StopAfter(4))
    next((tmp_path / "store" / WORK_FOLDER).glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(OutputError, match=rf"{WORK_FOLDER}/\w+ was decoded, and is damaged: .* Remove its"):
        prepare(ShardReader(shards), tmp_path / "store", workers=0)
    shutil.rmtree(tmp_path / "store" / WORK_FOLDER)
    assert len(prepare(ShardReader(shards), tmp_path / "store", workers=0).train) == 64


def test_what_killed_runs_left_is_removed(tmp_path, shards):
    work = tmp_path / "store" / WORK_FOLDER
    with pytest.raises(Stopped):
        prepare(ShardReader(shards), tmp_path / "store", workers=0, stop=StopAfter(2))
    spool = next(work.glob("*.pixels"))
    for name in (f"{spool.stem}.123.tmp", f"{'0' * 32}.pixels", f".{spool.stem}.safetensors.x.tmp"):
        (work / name).write_bytes(b"left")
    with pytest.raises(Stopped):
        prepare(ShardReader(shards), tmp_path / "store", workers=0, stop=StopAfter(1))
    assert not [path for path in work.iterdir() if path.read_bytes() == b"left"]
    prepare(ShardReader(shards), tmp_path / "store", workers=0)
    work.mkdir()  # killed between the index and this
    prepare(ShardReader(shards), tmp_path / "store", workers=0)
    assert not work.exists()


def test_without_a_home_the_variable_that_names_a_cache_is_told(shards, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is for a user without a home
    with pytest.raises(UsageError, match="set XDG_CACHE_HOME"):
        load_source(f"wds:{shards}")


def test_two_sizes_of_one_source_have_a_place_each_in_the_cache(tmp_path, shards):
    for size in (6, 8, None):
        load_source(f"wds:{shards}", size=size, workers=0)
    assert len(list((tmp_path / "cache" / "distilled-data" / "stores").iterdir())) == 3


def test_a_folder_of_other_things_is_left_alone(tmp_path, shards):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"is not empty and not a store: found thesis\.txt"):
        prepare(ShardReader(shards), tmp_path / "store", overwrite=True)
    assert [path.name for path in (tmp_path / "store").iterdir() if path.name != ".lock"] == ["thesis.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="could not be written"):
        prepare(ShardReader(shards), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_stop_is_heard_between_units_and_the_next_run_goes_on(tmp_path, shards, small_files, monkeypatch):
    expected = prepare(ShardReader(shards), tmp_path / "expected", workers=0)
    decoded = []
    decode = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, image: decoded.append(1) or decode(self, image))
    stops = []
    for _ in range(20):
        try:
            found = prepare(ShardReader(shards), tmp_path / "store", workers=0, stop=StopAfter(2))
            break
        except Stopped as stop:
            stops.append(str(stop))
    assert stops[0] == "prepare, 3 of 8 units decoded"
    assert len(decoded) == len(IMAGES)  # no image twice
    assert re.fullmatch("prepare, [34] of 5 files written", stops[-1])
    assert found.fingerprint == expected.fingerprint
    assert content(tmp_path / "store") == content(tmp_path / "expected")


def test_a_preparation_killed_at_random_moments_gives_the_same_store(tmp_path):
    images = np.concatenate([np.roll(IMAGES, shift, 2) for shift in range(0, 12, 2)]).repeat(2, 1)
    shards = write_shards(tmp_path / "shards", images, np.tile(LABELS, 6), shards=60)
    arguments = [f"wds:{shards}/*.tar", "store", "--size", "48", "--workers", "2"]
    moments = random.Random(int(os.environ.get("KILL_SEED", "0")))
    kills, said = 0, tmp_path / "said"
    for _ in range(int(os.environ.get("KILLS", "3"))):  # 10 by hand before a release
        process = start(run_in_a_session, [*COMMAND, *arguments], tmp_path, output=said)
        limit = time.monotonic() + 60
        while not (tmp_path / "store").exists() and process.exitcode is None and time.monotonic() < limit:
            time.sleep(0.01)
        process.join(moments.uniform(0, 0.5))
        if process.exitcode is None:
            if moments.random() < 0.5 and os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, signal.SIGKILL)  # with its workers, or it alone
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0, said.read_text()
        if not (tmp_path / "store" / INDEX_FILE).exists():
            assert kills
    last = start(run_in_a_session, [*COMMAND, *arguments, "--verify"], tmp_path, output=said)
    assert finish(last) == 0, said.read_text()
    assert "verified: 480 images" in said.read_text()
    prepare(ShardReader(f"{shards}/*.tar"), tmp_path / "expected", decoder=Decoder(48), workers=0)
    assert content(tmp_path / "store") == content(tmp_path / "expected")
    left = {path.name for path in (tmp_path / "store").iterdir()}
    assert left == {path.name for path in (tmp_path / "expected").iterdir()}


def test_two_ranks_make_the_store_that_one_makes_and_one_of_them_tells_of_it(tmp_path, shards):
    write_tar(tmp_path / "shards" / "train-damaged.tar", [("empty.png", b""), ("empty.cls", b"0")])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [*COMMAND, f"wds:{shards}", "store", "--workers", "1", "--skip-damaged"]
    said = [(tmp_path / f"output of {rank}", tmp_path / f"errors of {rank}") for rank in range(2)]
    processes = [
        start(run_apart, words, tmp_path, output, output=errors, **meeting, RANK=str(rank))
        for rank, (output, errors) in enumerate(said)
    ]
    ends = [finish(process) for process in processes]
    results = [(output.read_text(), errors.read_text()) for output, errors in said]
    assert ends == [0, 0], results
    assert "fingerprint" in results[0][0]
    assert results[1][0] == ""
    assert ["left out 1 of 81" in " ".join(error.split()) for _, error in results] == [True, False]
    with pytest.warns(UserWarning, match="left out 1 of 81"):
        prepare(ShardReader(shards), tmp_path / "expected", workers=0, skip_damaged=True)
    assert content(tmp_path / "store") == content(tmp_path / "expected")
    assert read_index(tmp_path / "store") == read_index(tmp_path / "expected")


def test_a_full_disk_is_an_error_and_what_was_done_stays(tmp_path, shards):
    process = start(prepare_on_a_full_disk, shards, tmp_path, output=tmp_path / "said")
    assert finish(process) == 0
    told = (tmp_path / "said").read_text()
    assert re.search(r"OutputError the store store could not be written: .*Free some space", told), told
    assert not (tmp_path / "store" / INDEX_FILE).exists()


def test_a_worker_that_is_killed_is_an_error_with_advice(tmp_path, shards, monkeypatch):
    main = os.getpid()
    decode = Decoder.__call__

    def killed(self, image):
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(self, image)

    monkeypatch.setattr(Decoder, "__call__", killed)
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("fork", force=True)  # or what was set here is not so there
    try:
        with pytest.raises(SourceError, match=r"a process that decodes images has ended: .*fewer --workers"):
            prepare(ShardReader(shards), tmp_path / "store", workers=2)
    finally:
        multiprocessing.set_start_method(before, force=True)
    monkeypatch.undo()
    assert len(prepare(ShardReader(shards), tmp_path / "store", workers=2).train) == 64


def test_a_script_without_a_main_guard_is_told_so_and_does_not_wait_for_itself(tmp_path, shards):
    script = f"""
import multiprocessing
multiprocessing.set_start_method("spawn", force=True)
from ncfm_engine.sources import load_source, spread
spread.ELSE = 0
load_source("wds:{shards}", workers=2)
"""
    (tmp_path / "script.py").write_text(script)
    done = called([sys.executable, "script.py"], tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert 'what a script does must stand under `if __name__ == "__main__":`.' in done.stderr
    assert "SourceError: a process that decodes images has ended" in done.stderr


def test_damage_is_named_counted_skipped_and_listed(tmp_path):
    folder = write_folder(tmp_path / "folder", IMAGES, LABELS)
    for number in range(7):
        (folder / "leaf" / f"bad{number}.png").write_bytes(b"" if number else encoded(IMAGES[0])[:-40])
    with pytest.raises(SourceError, match=r"7 of 87 images cannot be used: leaf/bad0\.png \(.*; and 2 more"):
        prepare(FolderReader(folder), tmp_path / "store", workers=0)
    assert not (tmp_path / "store" / INDEX_FILE).exists()
    with pytest.warns(
        UserWarning, match=r"left out 7 of 87 images.*All are listed in the store's index\.json"
    ):
        prepare(FolderReader(folder), tmp_path / "store", workers=0, skip_damaged=True)
    listed = [dataclasses.astuple(row) for row in read_index(tmp_path / "store").damaged]
    assert [name for name, _ in listed] == [f"leaf/bad{number}.png" for number in range(7)]
    assert listed[1][1] == "the file is empty"
    assert "left out     7\n             leaf/bad0.png: " in describe_store(tmp_path / "store")
    with pytest.raises(
        SourceError, match="7 of 87 images cannot be used"
    ):  # who does not ask for it, is told
        prepare(FolderReader(folder), tmp_path / "store", workers=0)


def test_images_of_different_shapes_in_different_units_are_refused(tmp_path, shards):
    wide = np.zeros((12, 14, 3), np.uint8)
    write_shards(tmp_path / "shards", wide[None], np.array([0]), shards=1, part="train-wide")
    with pytest.raises(
        SourceError, match=r"12 x 12 pixels, .*train-wide-00000\.tar/000000 has 14 x 12.*--size"
    ):
        prepare(ShardReader(shards), tmp_path / "store", workers=0)


def test_what_is_wrong_in_another_process_is_told_by_this_one(tmp_path, shards):
    images = encoded(IMAGES[0, :, :9]), encoded(IMAGES[0])
    files = [
        file for key, image in enumerate(images) for file in ((f"{key}.png", image), (f"{key}.cls", b"0"))
    ]
    write_tar(tmp_path / "shards" / "train-odd.tar", files)
    with pytest.raises(
        SourceError, match=r"odd\.tar/0 has 9 x 12 pixels, .*/1 has 12 x 12\. Pass --size"
    ) as told:
        prepare(ShardReader(shards), tmp_path / "store", workers=2)
    assert "Traceback" not in str(told.value)


def test_the_command_prepares_describes_verifies_and_exports(tmp_path, here, shards):
    status, output, error = here(
        "prepare.py", f"wds:{shards}", "store", "--size", "8", "--verify", "--workers", "0"
    )
    assert status == 0, error
    assert "64 + 16 images of 3x8x8, 4 classes of 16 to 16" in output
    assert "verified: 80 images" in output
    assert "decode" in error
    status, output, error = here("prepare.py", "store:store", "--to-webdataset", "out")
    assert status == 0, error
    assert "written as 2 shards to out" in output
    assert "verified" not in output
    assert load_source(f"wds:{tmp_path}/out/*.tar").fingerprint == read_index(tmp_path / "store").fingerprint
    status, _, error = here("prepare.py", f"wds:{shards}", "again", "--to-webdataset", "out")
    assert status == 2
    assert "out is not an empty folder" in error
    assert not (tmp_path / "again").exists()  # told before anything is prepared


def test_the_words_of_the_command_decide_what_is_prepared(tmp_path, here, shards):
    prepare(ShardReader(shards), tmp_path / "expected", decoder=Decoder(8, "squash", 1), seed=3, workers=0)
    words = ("prepare.py", f"wds:{shards}", "store", "--workers", "0")
    status, output, _ = here(*words, "--time-budget", "0")
    stopped = "stopped in good order (prepare, 1 of 8 units decoded); go on with the same command\n"
    assert (status, output) == (75, stopped)
    assert here(*words)[0] == 0
    other = ("--size", "8", "--fit", "squash", "--channels", "1", "--seed", "3")
    status, _, error = here(*words, *other)
    assert (status, "replace it with --overwrite" in " ".join(error.split())) == (2, True)
    assert here(*words, *other, "--overwrite")[0] == 0
    assert content(tmp_path / "store") == content(tmp_path / "expected")
    assert read_index(tmp_path / "store") == read_index(tmp_path / "expected")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("digits",), 2, "name a source and the store to write"),
        (("store:x", "y"), 2, "name a source and the store to write"),
        (("store:x",), 2, "x is not a store"),
        *(
            (("store:x", *words), 2, "store:x is prepared already; expected no --seed, --overwrite")
            for words in (("--overwrite",), ("--seed", "1"), ("--skip-damaged",))
        ),
        (("wds:nowhere/*.tar", "y"), 2, "names no file"),
        (("digits", "y", "--size", "0"), 2, "size=0"),
        (
            ("digits", "y", "--classes", "z"),
            2,
            "--classes z has no meaning for the dataset 'digits', only for wds, npz",
        ),
    ],
)
def test_wrong_usage_is_one_paragraph(here, arguments, status, message):
    found, _, error = here("prepare.py", *arguments)
    assert found == status
    assert message in " ".join(error.split())


def test_a_store_serves_the_main_job_and_its_reading_is_recorded(tmp_path, here, shards):
    tiny = ["network.width=8", "network.depth=2", "pretrain.networks=1", "pretrain.epochs=1",
    "distill.iterations=2",
            "distill.real_batch=4", "distill.frequencies=16", "evaluate.epochs=1", "evaluate.repeats=1",
            "evaluate.full_epochs=1", "evaluate.full_repeats=1"]  # fmt: skip
    said = "--ipc 1 --size 8 --workers 0"
    words = ("--dataset", f"wds:{shards}", *said.split())
    status, _, error = here("distill_and_push.py", *words, settings=tiny)
    assert status == 0, error
    info = DistilledDataset.from_folder(tmp_path / "distilled" / "shards-ipc1").info
    assert (info.dataset, info.source["id"], info.source["reading"]) == ("shards", "wds:shards", {"size": 8})
    status, _, error = here("evaluate.py", "distilled/shards-ipc1")
    assert status == 2
    assert "name it with --dataset wds:URL-or-glob" in " ".join(error.split())
    status, _, error = here(
        "evaluate.py", "distilled/shards-ipc1", "--dataset", f"wds:{shards}", "--seeds", "1"
    )
    assert status == 0, error
    assert torch.tensor(info.mean).shape == (3,)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of webdataset
def test_the_benchmark_of_preparing_measures_something_of_a_few_small_images_too(here, tmp_path):
    small = "--classes 2 --per-class 8 --pixels 16 --shards 2 --workers 0 --rounds 2 --output rows.json"
    status, _, errors = here("benchmark_preparing.py", *small.split())
    assert status == 0, errors
    found = json.loads((tmp_path / "rows.json").read_text())
    assert len(found["rows"]) == 2 * 3
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 for row in found["rows"])
    assert min(found["bytes_per_second"].values()) > 0
