"""Real data: order, splits and fingerprints follow from the content alone; unfit data is named."""

import dataclasses
import hashlib
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from children import context, finish, received, start
from photographs import encoded
from PIL import Image

from distilled_data.errors import MissingExtraError, SourceError, UnknownNameError, UsageError
from ncfm_engine.sources import SOURCES, LabelledImages, Source, hold_out, load_source
from ncfm_engine.sources.archives import ArchiveReader
from ncfm_engine.sources.decode import Decoder
from ncfm_engine.sources.folder import FolderReader
from ncfm_engine.sources.reader import Damage

# Many of the images here are of one colour, and so the same.
pytestmark = pytest.mark.filterwarnings("ignore:.* test images are training images too")


def pixels(seed: int, shape: tuple[int, ...] = (4, 4)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, image: np.ndarray | Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)


def save_classes(root: Path, classes: Sequence[str] = "ab", images: int = 3, seed: int = 0) -> Path:
    """Random grey PNGs, 4 x 4 pixels, `images` per class."""
    for c, name in enumerate(classes):
        for i in range(images):
            save(root / name / f"{i}.png", pixels(1000 * seed + 100 * c + i))
    return root


def load_folder(root: Path, **options) -> Source:
    return load_source(f"folder:{root}", **options)


def digests(part: LabelledImages) -> list[str]:
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in part.images]


# The order of images and the splits


def test_images_are_sorted_by_class_then_by_the_digest_of_their_bytes(digits):
    for part in (digits.train, digits.test):
        keys = list(zip(part.targets.tolist(), digests(part), strict=True))
        assert keys == sorted(keys)


def test_counts_are_the_images_of_each_class_even_of_a_class_without_any():
    images, targets = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 2])
    part = LabelledImages(images, targets, 4, digests=torch.zeros(3, 32), sums=torch.zeros(3, 1, 2))
    assert part.counts.tolist() == [2, 0, 1, 0]
    assert len(part) == 3


def test_digits_are_grey_and_cover_the_range_of_a_byte(digits):
    assert (digits.channels, digits.height, digits.width, digits.num_classes) == (1, 8, 8, 10)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.unique().tolist() == [round(x * 255 / 16) for x in range(17)]


def test_digits_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    known = sorted(zip(map(bytes, images.astype(np.uint8)), targets, strict=True))
    found = []
    for part in (digits.train, digits.test):
        originals = (part.images.double() * 16 / 255).round().byte().flatten(1).numpy()
        found += zip(map(bytes, originals), part.targets.tolist(), strict=True)
    assert sorted(found) == known


def test_the_test_split_takes_a_fifth_of_every_class_and_leaves_the_rest(digits):
    whole = digits.train.counts + digits.test.counts
    assert int(whole.sum()) == 1797
    torch.testing.assert_close(digits.test.counts, (whole * 0.2).round().long())


def test_another_seed_draws_another_test_split(digits):
    assert digests(load_source("digits", seed=1).test) != digests(digits.test)


def test_the_held_out_images_come_from_train_and_leave_it(digits):
    validation = hold_out(digits, fraction=0.1, seed=3)
    assert sorted(digests(validation.train) + digests(validation.test)) == sorted(digests(digits.train))
    torch.testing.assert_close(validation.test.counts, (digits.train.counts * 0.1).round().long())


def test_the_held_out_images_keep_their_labels(digits):
    labels = dict(zip(digests(digits.train), digits.train.targets.tolist(), strict=True))
    test = hold_out(digits).test
    assert [labels[digest] for digest in digests(test)] == test.targets.tolist()


def test_a_held_out_source_has_its_own_fingerprint_and_statistics(digits):
    validation = hold_out(digits)
    assert validation.fingerprint not in (digits.fingerprint, hold_out(digits, seed=1).fingerprint)
    assert validation.mean != digits.mean
    assert validation.fingerprint == hold_out(digits).fingerprint


def test_removing_an_image_changes_the_held_out_images_by_one_at_most(digits):
    kept = torch.arange(len(digits.train)) != 700
    fewer = dataclasses.replace(digits, train=digits.train.where(kept))
    before, after = set(digests(hold_out(digits).test)), set(digests(hold_out(fewer).test))
    assert len(before ^ after) <= 2  # one may leave and another take its place


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_split_leaves_both_sides_an_image_of_every_class(digits, fraction):
    validation = hold_out(digits, fraction)
    assert min(validation.train.counts.min(), validation.test.counts.min()) >= 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_fraction_outside_of_zero_to_one_is_refused(digits, fraction):
    with pytest.raises(UsageError, match="between 0 and 1"):
        hold_out(digits, fraction)


# What is measured


def test_mean_and_std_are_those_of_the_train_images_per_channel(tmp_path):
    for name in "ab":
        for i in range(4):
            save(tmp_path / name / f"{i}.png", pixels(ord(name) + 7 * i, (4, 5, 3)))
    source = load_folder(tmp_path)
    scaled = source.train.images.double() / 255
    assert source.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist())
    assert source.std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist())


def test_a_channel_that_never_varies_has_a_positive_std(tmp_path):
    for name in "ab":
        for i in range(2):
            save(tmp_path / name / f"{i}.png", np.zeros((4, 4), dtype=np.uint8))
    assert load_folder(tmp_path).std[0] > 0


def test_digits_saved_as_shuffled_png_files_keep_their_fingerprint(digits, tmp_path):
    images = torch.cat([digits.train.images, digits.test.images])[:, 0].numpy()
    targets = torch.cat([digits.train.targets, digits.test.targets]).tolist()
    names = np.random.default_rng(0).permutation(len(images))
    for image, target, name in zip(images, targets, names, strict=True):
        save(tmp_path / str(target) / f"{name}.png", image)
    assert load_folder(tmp_path).fingerprint == digits.fingerprint


def test_a_pixel_a_class_name_and_a_label_are_part_of_the_fingerprint(tmp_path):
    original = load_folder(save_classes(tmp_path / "original"))
    renamed = load_folder(save_classes(tmp_path / "renamed", classes="ac"))
    other_pixel = save_classes(tmp_path / "pixel")
    changed = pixels(0)
    changed[0, 0] ^= 1
    save(other_pixel / "a" / "0.png", changed)
    swapped = save_classes(tmp_path / "swapped", classes="ba")
    fingerprints = [source.fingerprint for source in (original, renamed)]
    fingerprints += [load_folder(root).fingerprint for root in (other_pixel, swapped)]
    assert len(set(fingerprints)) == 4


# Arguments


def test_an_unknown_name_is_refused_with_the_close_ones():
    with pytest.raises(UnknownNameError, match=r"unknown dataset 'cifar'.*'cifar10'"):
        load_source("cifar")


def test_a_path_after_a_name_that_takes_none_is_refused():
    with pytest.raises(UnknownNameError, match="digits:here"):
        load_source("digits:here")


def test_a_folder_without_a_path_is_refused():
    with pytest.raises(UsageError, match="folder:PATH"):
        load_source("folder")


def test_a_data_folder_is_refused_where_it_has_no_meaning(tmp_path):
    with pytest.raises(UsageError, match=r"only for cifar10.*folder:PATH"):
        load_source("digits", data=tmp_path)


def test_a_label_column_is_refused_where_it_has_no_meaning():
    with pytest.raises(UsageError, match=r"--label-column fine has no meaning .* only for hf"):
        load_source("digits", label_column="fine")


def test_a_size_a_fit_or_a_number_of_channels_that_is_none_is_refused():
    for wrong in ({"size": 0}, {"size": True}, {"fit": "pad"}, {"channels": 2}):
        [(name, value)] = wrong.items()
        with pytest.raises(UsageError, match=f"{name}={value!r}"):
            load_source("digits", **wrong)


def test_the_sources_are_these():
    named = ("digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "svhn")
    assert (*named, "folder", "hf", "wds", "npz", "store") == SOURCES


def test_size_resizes_the_images_of_a_named_source():
    assert load_source("digits", size=12).train.images.shape[1:] == (1, 12, 12)


# Archives of torchvision, in small


@pytest.fixture
def cifar10(tmp_path, monkeypatch) -> Path:
    """CIFAR-10 in torchvision's layout, with three images of each class in train and one in test."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, repeats in (("data_batch_1", 3), ("test_batch", 1)):
        labels = list(range(10)) * repeats
        entry = {"data": pixels(repeats, (len(labels), 3072)), "labels": labels}
        (folder / name).write_bytes(pickle.dumps(entry))  # the layout that torchvision reads
    names = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": None})
    return tmp_path


def write_mnist(root: Path, parts: tuple[str, ...] = ("train", "t10k")) -> Path:
    """MNIST's files with twenty images of 28 x 28 pixels; those of class k are filled with k."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    labels = np.arange(20, dtype=np.uint8) % 10
    images = np.broadcast_to(labels[:, None, None], (20, 28, 28))
    for part in parts:
        head = struct.pack(">IIII", 0x803, *images.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 20) + labels.tobytes())
    return root


def test_cifar10_on_disk_gives_channels_first_images_with_their_labels(cifar10):
    source = load_source("cifar10", data=cifar10)
    assert source.classes == tuple(f"class {i}" for i in range(10))
    assert source.train.counts.tolist() == [3] * 10
    written = pixels(1, (10, 3072)).reshape(10, 3, 32, 32)
    np.testing.assert_array_equal(source.test.images.numpy(), written)


def test_mnist_on_disk_gives_images_with_their_labels(tmp_path):
    source = load_source("mnist", data=write_mnist(tmp_path))
    assert source.train.images.shape == (20, 1, 28, 28)
    assert source.train.images[:, 0, 5, 5].tolist() == source.train.targets.tolist()


def test_svhn_on_disk_gives_channels_first_images_with_their_labels(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    labels = np.arange(1, 11, dtype=np.uint8)  # SVHN writes 10 for the digit 0
    images = np.broadcast_to(labels % 10, (32, 32, 3, 10)).copy()
    for part, blue in (("train", 100), ("test", 200)):
        images[:, :, 2] = blue
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": labels[:, None]})
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    source = load_source("svhn", data=tmp_path)
    assert source.train.images[:, 0, 3, 4].tolist() == source.train.targets.tolist() == list(range(10))
    assert source.train.images[:, 2].unique().tolist() == [100]
    assert source.test.images[:, 2].unique().tolist() == [200]


def test_missing_scipy_names_the_extra(monkeypatch, tmp_path):
    from torchvision.datasets import SVHN

    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingExtraError, match=r"scipy.*distilled-data\[data\]"):
        load_source("svhn", data=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist", "svhn"])
def test_missing_files_are_named_with_the_folder_and_the_ways_out(name, tmp_path):
    with pytest.raises(
        SourceError, match=rf"{re.escape(str(tmp_path))}.*missing are .*https?://.*--data"
    ) as raised:
        load_source(name, data=tmp_path)
    assert "download=True" not in str(raised.value)  # torchvision's advice, which is no flag of ours


def test_only_the_files_that_are_missing_are_called_missing(tmp_path):
    root = write_mnist(tmp_path, parts=("t10k",))
    missing = r"missing are train-images-idx3-ubyte, train-labels-idx1-ubyte\."
    with pytest.raises(SourceError, match=missing):
        load_source("mnist", data=root)


def test_files_with_a_wrong_checksum_are_refused_before_they_are_unpickled(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"cos\nabort\n(tR.")  # unpickling this ends the process
    with pytest.raises(SourceError, match="one at least is damaged"):
        load_source("cifar10", data=tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    file = write_mnist(tmp_path) / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SourceError, match="one at least is damaged"):
        load_source("mnist", data=tmp_path)


def test_files_are_not_called_damaged_where_memory_was_too_small(tmp_path, monkeypatch):
    def lacking(*_, **__):
        raise MemoryError

    monkeypatch.setattr("torchvision.datasets.MNIST._load_data", lacking)
    with pytest.raises(MemoryError):
        load_source("mnist", data=write_mnist(tmp_path))


def test_labels_that_do_not_fit_the_images_are_refused(tmp_path):
    file = write_mnist(tmp_path) / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    file.write_bytes(struct.pack(">II", 0x801, 10) + bytes(range(10)))
    with pytest.raises(SourceError, match="20 images and 10 labels"):
        load_source("mnist", data=tmp_path)
    assert not multiprocessing.active_children()  # that decoded: they ended at once


def test_files_of_an_archive_that_changed_are_read_again(tmp_path):
    file = write_mnist(tmp_path) / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    assert load_source("mnist", data=tmp_path).test.images.unique().tolist() == list(range(10))
    file.write_bytes(file.read_bytes()[:16] + bytes(20 * 28 * 28))
    assert load_source("mnist", data=tmp_path).test.images.unique().tolist() == [0]


@pytest.mark.parametrize("name", ["CIFAR10", "SVHN"])
def test_a_failed_download_names_the_cache_and_the_ways_out(tmp_path, monkeypatch, name):
    import torchvision

    def download(self):
        raise URLError("no route to host")

    monkeypatch.setattr(getattr(torchvision.datasets, name), "download", download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = re.escape(str(tmp_path / "distilled-data"))
    with pytest.raises(SourceError, match=rf"downloaded to {cache}.*no route to host.*--data"):
        load_source(name.lower())


def test_what_was_downloaded_is_prepared_once(monkeypatch):
    from torchvision.datasets import MNIST

    def download(self):
        return Path(self.raw_folder).exists() or write_mnist(Path(self.root))

    monkeypatch.setattr(MNIST, "download", download)
    fingerprint = load_source("mnist").fingerprint
    monkeypatch.setattr(ArchiveReader, "read", None)
    assert load_source("mnist").fingerprint == fingerprint


def download_and_load(said, go_on):
    from torchvision.datasets import MNIST

    def download(self):
        if not Path(self.raw_folder).exists():
            said.put("downloads")
            go_on.get()
            write_mnist(Path(self.root))

    MNIST.download = download
    warnings.showwarning = lambda message, *place: said.put(str(message))
    said.put(len(load_source("mnist", workers=0).train))


def test_of_two_processes_that_need_the_same_download_one_makes_it(tmp_path):
    said, go_on, cache = context.SimpleQueue(), context.SimpleQueue(), {"XDG_CACHE_HOME": str(tmp_path)}
    processes = [first := start(download_and_load, said, go_on, **cache)]
    try:
        assert received(said, first) == "downloads"
        processes.append(second := start(download_and_load, said, go_on, **cache))
        assert received(said, second) == "download mnist, waiting for another process that does the same"
        go_on.put(None)
        assert [finish(process) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


def test_a_data_folder_is_never_downloaded_to(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "download", lambda self: pytest.fail("tried to download"))
    with pytest.raises(SourceError):
        load_source("mnist", data=tmp_path)


# Folders


def test_a_train_and_a_test_folder_are_used_as_they_are(tmp_path):
    save_classes(tmp_path / "train", images=3)
    save_classes(tmp_path / "test", images=2, seed=1)
    source = load_folder(tmp_path)
    assert (source.train.counts.tolist(), source.test.counts.tolist()) == ([3, 3], [2, 2])


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_stands_in_for_a_missing_test_folder(tmp_path, name):
    save_classes(tmp_path / "train", images=3)
    save_classes(tmp_path / name, images=2, seed=1)
    assert load_folder(tmp_path).test.counts.tolist() == [2, 2]


def test_beside_a_test_folder_one_for_validation_is_left_out(tmp_path):
    for number, name in enumerate(("validation", "train", "val", "test", "valid")):
        save_classes(tmp_path / name, images=2 + number, seed=number)
    with pytest.warns(UserWarning, match="images are those in test; left out: val, valid, validation"):
        source = load_folder(tmp_path)
    assert (source.train.counts.tolist(), source.test.counts.tolist()) == ([3, 3], [5, 5])


def test_test_images_without_labels_leave_the_place_to_those_with(tmp_path):
    for name in ("train", "val"):
        save_classes(tmp_path / name, images=3, seed=len(name))
    save_classes(tmp_path / "test", "x").joinpath("x").rename(tmp_path / "test" / "images")
    with pytest.warns(UserWarning, match="images are those in val; left out: test"):
        source = load_folder(tmp_path)
    assert (source.train.counts.tolist(), source.test.counts.tolist()) == ([3, 3], [3, 3])
    shutil.rmtree(tmp_path / "val" / "a")
    with (
        pytest.warns(UserWarning, match="images are those in test"),
        pytest.raises(SourceError, match=r"only test has images.* without labels are no test images"),
    ):
        FolderReader(tmp_path)


def test_tiny_imagenet_is_read_as_it_lies(tmp_path):
    for name in "ab":
        save_classes(tmp_path / "train" / name, ["images"], images=3)
    save_classes(tmp_path / "test", ["images"], seed=1)
    save_classes(tmp_path / "val", ["images"], images=3, seed=2)
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("1.png\tb\t0\t32\t44\t62\n0.png\ta\t2\t3\t60\t63\n2.png\tb\t0\t0\t1\t1\n")
    with pytest.warns(UserWarning, match="images are those in val; left out: test"):
        reader = FolderReader(tmp_path)
    assert reader.classes == ["a", "b"]
    found = {(unit.part, name): label for unit in reader.units for name, label, *_ in unit.what}
    train = {("train", f"{name}/images/{n}.png"): label for label, name in enumerate("ab") for n in range(3)}
    tested = {("test", f"val/images/{n}.png"): label for n, label in enumerate((0, 1, 1))}
    assert (
        found
        == {(part, f"train/{n}" if part == "train" else n): k for (part, n), k in train.items()} | tested
    )
    with pytest.warns(UserWarning, match="left out: test"):
        assert load_folder(tmp_path).test.counts.tolist() == [1, 2]


def test_images_that_annotations_do_not_name_are_told_of(tmp_path):
    save_classes(tmp_path / "train")
    save_classes(tmp_path / "val", ["images"], images=4, seed=1)
    (tmp_path / "val" / "val_annotations.txt").write_text("0.png\ta\n2.png\tb\n")
    with pytest.warns(
        UserWarning, match=r"left out 2 images that val_annotations.txt does not name.* val/images/1"
    ):
        FolderReader(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0.png", "line 2: expected the name of an image in images, a tab and its class, got '0.png'"),
        ("../0.png\ta", "line 2: expected the name"),
        ("0\0.png\ta", "line 2: expected the name"),
        ("0.png\tb", r"line 2: 0\.png is there twice"),
        ("2.png\tc", "only val has c"),
        ("out.png\ta", "is a symbolic link to .*, outside of"),
    ],
)
def test_annotations_that_tell_no_class_of_train_are_refused(tmp_path, line, message):
    save_classes(tmp_path / "train")
    save_classes(tmp_path / "val", ["images"])
    (tmp_path / "val" / "images" / "out.png").symlink_to(__file__)
    (tmp_path / "val" / "val_annotations.txt").write_text(f"0.png\ta\n{line}\n1.png\tb\n")
    with pytest.raises(SourceError, match=message):
        FolderReader(tmp_path)


@pytest.mark.parametrize(
    "names",
    [["train", "eval"], ["Train", "Test"], ["Training", "more"], ["train"], ["test", "more"], ["val"]],
)
def test_splits_are_not_taken_for_classes(tmp_path, names):
    for name in names:
        save_classes(tmp_path / name)
    found = ", ".join(sorted(set(names) - {"more"}))
    with pytest.raises(
        SourceError, match=rf"holds {found}, named like a split.*test, val, valid, validation"
    ):
        FolderReader(tmp_path)


def test_splits_without_classes_are_not_taken_for_classes(tmp_path):
    with pytest.raises(SourceError, match="holds dev, train, named like a split"):
        FolderReader(save_classes(tmp_path, classes=["train", "dev"]))


def test_a_class_of_trains_is_one(tmp_path):
    save_classes(tmp_path / "train", classes=["bus", "train"])
    save_classes(tmp_path / "test", classes=["bus", "train"])
    (tmp_path / "train" / "train" / "notes.txt").touch()
    assert FolderReader(tmp_path).classes == ["bus", "train"]


def test_the_parts_of_a_folder_must_hold_the_same_classes(tmp_path):
    save_classes(tmp_path / "train", classes="abc")
    save_classes(tmp_path / "test", classes="abd")
    with pytest.raises(SourceError, match=r"only train has c; only test has d\. Add"):
        load_folder(tmp_path)
    save_classes(tmp_path / "test", classes="efghij")
    with pytest.raises(SourceError, match=r"only test has d, e, f, g, h and 2 more\. Add"):
        load_folder(tmp_path)


def test_test_images_that_are_training_images_too_are_told_of(tmp_path):
    save_classes(tmp_path / "train")
    save_classes(tmp_path / "test", seed=1)
    with warnings.catch_warnings(action="error"):
        load_folder(tmp_path)
    for name in ("0.png", "1.png"):
        shutil.copy(tmp_path / "train" / "a" / name, tmp_path / "test" / "b" / f"again{name}")
    with pytest.warns(UserWarning, match="2 of 8 test images are training images too"):
        source = load_folder(tmp_path, store=tmp_path / "store")
    with pytest.warns(UserWarning, match="2 of 8 test images"):
        assert load_source(f"store:{tmp_path / 'store'}").fingerprint == source.fingerprint


@pytest.mark.parametrize(("own", "told"), [(99, True), (100, False)])
def test_a_few_test_images_that_are_training_images_too_are_not_told_of(tmp_path, own, told):
    images = np.arange(own + 3, dtype=np.uint8).repeat(16).reshape(-1, 4, 4)
    labels = np.arange(len(images)) % 2
    np.savez(
        tmp_path / "a.npz",
        x_train=np.concatenate([images[:1], 255 - images[:2]]),
        y_train=[0, 1, 1],
        x_test=images[: own + 1],
        y_test=labels[: own + 1],
    )
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        load_source(f"npz:{tmp_path / 'a.npz'}", store=tmp_path / "store")
    assert [str(note.message).split(" test ")[0] for note in notes] == (["a: 1 of 100"] if told else [])


def test_a_source_from_a_folder_tells_its_base_name_and_no_path(tmp_path):
    source = load_folder(save_classes(tmp_path / "flowers"))
    assert (source.name, source.origin.id) == ("flowers", "folder:flowers")
    assert not any(str(tmp_path) in str(value) for value in vars(source).values())


def test_images_below_a_class_folder_are_found_at_any_depth_and_hidden_ones_are_not(tmp_path):
    save_classes(tmp_path, images=2)
    save(tmp_path / "a" / "deep.png" / "er" / "2.PNG", pixels(2))
    save(tmp_path / "a" / ".hidden.png", pixels(3))
    for number in (4, 6):
        save(tmp_path / "a" / ".cache" / f"{number}.png", pixels(number))
    save(tmp_path / ".git" / "5.png", pixels(5))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    source = load_folder(tmp_path)
    assert source.classes == ("a", "b")
    assert (source.train.counts + source.test.counts).tolist() == [3, 2]


FORMATS = ["png", "bmp", "gif", "ppm", "webp", "jpg", "jpeg", "jpe", "jfif", "pnm"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_listed_format_is_read(tmp_path, suffix):
    for name, colour in (("a", (200, 30, 60)), ("b", (10, 180, 90))):
        for i in range(2):
            save(tmp_path / name / f"{i}.{suffix}", Image.new("RGB", (16, 16), colour))
    pixel = load_folder(tmp_path).train.images[:, :, 8, 8]
    expected = torch.tensor([[200, 30, 60], [10, 180, 90]])
    torch.testing.assert_close(pixel.long(), expected, atol=3, rtol=0)  # JPEG and WebP round


@pytest.mark.parametrize(("suffix", "mode"), [("pgm", "L"), ("pbm", "1")])
def test_grey_formats_are_read(tmp_path, suffix, mode):
    for name, value in (("a", 0), ("b", 255)):
        for i in range(2):
            save(tmp_path / name / f"{i}.{suffix}", Image.new(mode, (4, 4), value), format="PPM")
    assert load_folder(tmp_path).train.images[:, 0, 0, 0].tolist() == [0, 255]


def test_images_of_other_formats_are_named_and_not_left_out(tmp_path):
    save(save_classes(tmp_path) / "a" / "scan.TIF", pixels(0))
    with pytest.raises(SourceError, match=r"1 of 7 images cannot be used: a/scan\.TIF \(no image of a known"):
        load_folder(tmp_path)


def test_files_that_are_not_named_like_images_are_counted_in_one_warning(tmp_path):
    save_classes(tmp_path)
    for name in ("Thumbs.db", "desktop.ini", "labels.csv", ".hidden"):  # nobody takes these for images
        (tmp_path / "a" / name).write_text("")
    FolderReader(tmp_path)
    for name in ("a/0001", "b/more.zip"):
        (tmp_path / name).write_text("")
    with pytest.warns(UserWarning, match=r"left out 2 files .*, such as a/0001\. Give images a suffix"):
        FolderReader(tmp_path)


def test_a_transparent_colour_of_a_png_without_alpha_channel_is_refused(tmp_path):
    save(save_classes(tmp_path) / "b" / "odd.png", Image.new("L", (4, 4), 7), transparency=7)
    with pytest.raises(SourceError, match=r"b/odd\.png \(transparent"):
        load_folder(tmp_path)


def test_a_fit_without_a_size_is_refused(tmp_path):
    with pytest.raises(UsageError, match="add --size"):
        load_folder(save_classes(tmp_path), fit="squash")


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 42])
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_a_jpeg_decoded_at_a_fraction_is_not_shifted(fit, orientation):
    across, down = np.meshgrid(np.linspace(0, 255, 257), np.linspace(0, 255, 129))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = np.stack([across, down, across], 2).round().astype(np.uint8)
    found, expected = (
        Decoder(16, fit)(encoded(image, kind, exif=exif, **options)).astype(int)
        for kind, options in (("jpeg", {"quality": 100, "subsampling": 0}), ("png", {}))
    )
    assert abs(found - expected).max() <= 1  # shifted it would be 3


def test_images_of_two_sizes_are_refused_with_one_of_each_and_the_flag(tmp_path):
    save(save_classes(tmp_path / "images") / "b" / "odd.png", pixels(9, (4, 5)))
    expected = r"a/0\.png has 4 x 4 pixels, b/odd\.png has 5 x 4\. Pass --size"
    with pytest.raises(SourceError, match=expected):
        load_folder(tmp_path / "images")
    assert load_folder(tmp_path / "images", size=4).height == 4


@pytest.mark.parametrize("colour_class", ["a", "b"])
def test_grey_and_colour_images_together_are_refused_with_one_of_each(tmp_path, colour_class):
    for name in "ab":
        save(tmp_path / name / "0.png", pixels(0, (4, 4, 3) if name == colour_class else (4, 4)))
    grey_class = "ab".replace(colour_class, "")
    expected = rf"{grey_class}/0\.png is grey, {colour_class}/0\.png is in colour"
    with pytest.raises(SourceError, match=expected):
        load_folder(tmp_path, size=4)


def damage(root: Path, files: int = 7) -> Path:
    for i in range(files):
        (root / "a" / f"bad{i}.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    return root


def test_unreadable_images_are_counted_and_five_are_named(tmp_path):
    with pytest.raises(SourceError, match=r"7 of 13 images cannot be used: .*--skip-damaged") as caught:
        load_folder(damage(save_classes(tmp_path)))
    assert [f"a/bad{i}.png" in str(caught.value) for i in range(7)] == [True] * 5 + [False] * 2


def test_skip_damaged_leaves_unreadable_images_out_with_one_warning(tmp_path):
    damage(save_classes(tmp_path, images=3))
    with pytest.warns(UserWarning, match="left out 7 of 13 images") as caught:
        source = load_folder(tmp_path, skip_damaged=True)
    (warning,) = (entry for entry in caught if entry.category is UserWarning)
    assert "a/bad4.png" in str(warning.message)
    assert (source.train.counts + source.test.counts).tolist() == [3, 3]


def test_a_decompression_bomb_is_unreadable(tmp_path, monkeypatch):
    save(save_classes(tmp_path) / "a" / "bomb.png", pixels(0, (9, 9)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # Pillow's error comes at twice as many
    with pytest.raises(SourceError, match=r"a/bomb\.png \(.*decompression bomb"):
        load_folder(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_not_left_out(tmp_path):
    save(save_classes(tmp_path) / "a" / "deep" / "0.png", pixels(0))
    (tmp_path / "a" / "deep").chmod(0)
    with pytest.raises(SourceError, match=r"a/deep cannot be read"):
        load_folder(tmp_path)


def test_an_empty_class_folder_is_named_before_anything_is_decoded(tmp_path):
    (save_classes(tmp_path) / "c").mkdir()
    (tmp_path / "c" / "0001").touch()
    expected = f"{tmp_path} has no usable image of 1 of its 3 classes: 'c'"
    with (
        pytest.warns(UserWarning, match="left out 1 files .*, such as c/0001"),
        pytest.raises(SourceError, match=expected),
    ):
        FolderReader(tmp_path)


def test_an_empty_class_folder_of_test_images_is_named(tmp_path):
    save_classes(tmp_path / "train")
    (save_classes(tmp_path / "test", "a") / "b").mkdir()
    with pytest.raises(SourceError, match="no usable test image of 1 of its 2 classes: 'b'"):
        FolderReader(tmp_path)


def test_folders_without_any_image_that_can_be_used_are_named(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").touch()
    with pytest.raises(SourceError, match="has no image that can be used"):
        load_folder(tmp_path, skip_damaged=True)


def test_a_single_class_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"holds one class folder \(a\); expected two or more"):
        load_folder(save_classes(tmp_path, classes="a"))


def test_a_class_of_one_image_cannot_be_split(tmp_path):
    folder = save_classes(tmp_path / "images")
    save(folder / "c" / "0.png", pixels(0))
    with pytest.raises(SourceError, match="class 'c' has 1 image; a test split"):
        load_folder(folder)
    save(folder / "c" / "1.png", pixels(1))
    with pytest.raises(SourceError, match="class 'c' has 1 training image; a validation split"):
        hold_out(load_folder(folder))


def test_the_home_folder_has_its_usual_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # where a sign that is not understood makes a folder
    expected = load_folder(save_classes(tmp_path / "images"), store="~/store").fingerprint
    assert (tmp_path / "store" / "index.json").is_file()
    images = np.stack([pixels(100 * c + i) for c in range(2) for i in range(3)])
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(6) // 3, classes=np.array(["a", "b"]))
    for spec in ("folder:~/images", "store:~/store", "npz:~/a.npz"):
        assert load_source(spec).fingerprint == expected
    (tmp_path / "names.txt").write_text("c\nd\n")
    assert load_source("npz:~/a.npz", classes="~/names.txt").classes == ("c", "d")
    assert load_source("mnist", data=write_mnist(tmp_path) and "~").num_classes == 10


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"nowhere is not a folder"):
        load_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("link", ["a/link.png", "a/link", "c"])
def test_a_symbolic_link_that_leaves_the_folder_is_refused(tmp_path, link):
    root = save_classes(tmp_path / "inside")
    outside = save_classes(tmp_path / "outside") / "a"
    (root / link).symlink_to(outside / "0.png" if link.endswith("png") else outside)
    with pytest.raises(SourceError, match=rf"{link} is a symbolic link to .*outside"):
        load_folder(root)


def test_a_symbolic_link_that_stays_in_the_folder_is_read(tmp_path):
    root = save_classes(tmp_path, images=2)
    (root / "a" / "link.png").symlink_to(root / "b" / "0.png")
    (root / "c").symlink_to("b")
    source = load_folder(root)
    assert (source.train.counts + source.test.counts).tolist() == [3, 2, 2]


@pytest.mark.parametrize("target", ["moved", "c"])
def test_a_link_to_nothing_is_no_missing_class(tmp_path, target):
    (save_classes(tmp_path) / "notes.txt").symlink_to("nowhere")  # which is no class
    assert FolderReader(tmp_path).classes == ["a", "b"]
    (tmp_path / "c").symlink_to(target)
    with pytest.raises(
        SourceError, match=rf"{tmp_path}/c is a symbolic link to {target}, which is not there"
    ):
        FolderReader(tmp_path)


def test_a_link_that_leads_to_itself_is_named(tmp_path):
    (save_classes(tmp_path / "images") / "a" / "x.png").symlink_to("x.png")
    with pytest.raises(SourceError, match=r"a/x\.png \(Too many levels of symbolic links\)"):
        load_folder(tmp_path / "images", workers=0)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SourceError, match="loop is not a folder"):
        FolderReader(tmp_path / "loop")


def test_a_file_that_is_gone_is_damage_and_one_that_cannot_be_reached_is_none(tmp_path):
    for name in ("b/0.png", "c/deep/0.png"):
        save(save_classes(tmp_path, "abc") / name, pixels(0))
    reader = FolderReader(tmp_path)
    (tmp_path / "b" / "0.png").unlink()
    found = [record for record in list(reader.read(reader.units[0])) if isinstance(record, Damage)]
    assert found == [Damage("b/0.png", "No such file or directory")]
    (tmp_path / "c" / "deep").rename(tmp_path / "moved")
    (tmp_path / "c" / "deep").touch()
    with pytest.raises(SourceError, match=r"c/deep/0\.png cannot be read: Not a directory"):
        list(reader.read(reader.units[0]))


def test_a_pipe_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(save_classes(tmp_path) / "a" / "pipe.png")
    reader = FolderReader(tmp_path)
    found = [record for record in reader.read(reader.units[0]) if isinstance(record, Damage)]
    assert found == [Damage("a/pipe.png", "not a regular file")]


def test_a_class_name_that_no_artifact_can_hold_is_refused(tmp_path):
    os.mkdir(os.fsencode(save_classes(tmp_path)) + b"/caf\xe9")
    with pytest.raises(SourceError, match=r"caf\\xe9' is not UTF-8. Rename the folder"):
        FolderReader(tmp_path)
