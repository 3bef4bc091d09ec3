"""Arrays in .npz files as a source."""

import io
import zipfile

import numpy as np
import pytest
from artifacts import flip
from photographs import CLASSES, by_pixels, photographs, pixels_of

from distilled_data.errors import SourceError, UsageError
from ncfm_engine.sources import load_source, npz

IMAGES, LABELS = photographs(6)


def save(path, save=np.savez, **arrays):
    save(path, **arrays)
    return path


EXPECTED = by_pixels(IMAGES, LABELS)


@pytest.mark.parametrize(
    "names", [("images", "labels"), ("x_train", "y_train"), ("train_images", "train_labels"), ("x", "y")]
)
@pytest.mark.parametrize("function", [np.savez, np.savez_compressed])
def test_images_and_labels_are_found_by_the_names_in_use(tmp_path, names, function):
    path = save(tmp_path / "flowers.npz", function, **dict(zip(names, (IMAGES, LABELS), strict=True)))
    source = load_source(f"npz:{path}")
    assert pixels_of(source) == EXPECTED
    assert (source.name, source.origin.id, source.classes) == ("flowers", "npz:flowers.npz", tuple("0123"))


@pytest.mark.parametrize("number", [2**45, 10**30])
def test_labels_that_promise_more_than_there_can_be_are_refused(tmp_path, number):
    path = save(tmp_path / "a.npz", images=IMAGES)
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({number},), }}".ljust(117).encode() + b"\n"
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("labels.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(SourceError, match=r"a\.npz, array images: "):
        load_source(f"npz:{path}")


@pytest.mark.parametrize("names", [("x_test", "y_test"), ("test_images", "test_labels")])
def test_test_images_in_the_file_are_the_test_images(tmp_path, names):
    parts = {"images": IMAGES[:16], "labels": LABELS[:16]} | dict(
        zip(names, (IMAGES[16:], LABELS[16:]), strict=True)
    )
    source = load_source(f"npz:{save(tmp_path / 'a.npz', **parts)}")
    assert (len(source.train), len(source.test)) == (16, 8)
    assert pixels_of(source) == EXPECTED


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.transpose(0, 3, 1, 2).copy(),
        lambda x: x[..., :1].copy(),
        lambda x: x[:, None, ..., 0].copy(),
        lambda x: x[..., 0].copy(),
    ],
)
def test_channels_may_come_first_and_a_single_one_may_be_left_out(tmp_path, form):
    path = save(tmp_path / "a.npz", images=form(IMAGES), labels=LABELS[:, None])
    source = load_source(f"npz:{path}")
    expected = (
        EXPECTED
        if source.channels == 3
        else {i[..., 0].tobytes(): int(k) for i, k in zip(IMAGES, LABELS, strict=True)}
    )
    assert pixels_of(source) == expected


def test_classes_are_named_in_the_file_or_in_another(tmp_path):
    path = save(tmp_path / "a.npz", images=IMAGES, labels=LABELS, classes=np.array(CLASSES))
    assert load_source(f"npz:{path}").classes == CLASSES
    for names in ("dcba", "badc"):
        lines = "\ufeff{}\r\n{} \n\t{}\n\n{}\n".format(*names)
        (tmp_path / "names.txt").write_text(lines, encoding="utf-8")
        assert load_source(f"npz:{path}", classes=tmp_path / "names.txt").classes == tuple(names)


@pytest.mark.parametrize("content", [b"a\nb\nc\nc\n", b"a\n", b"", b"\xff\xfe", None])
def test_names_that_are_none_are_refused(tmp_path, content):
    path = save(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UsageError, match=r"names\.txt"):
        load_source(f"npz:{path}", classes=tmp_path / "names.txt")


def test_arrays_of_other_meanings_are_passed_over(tmp_path):
    for factor in (np.arange(20), np.array("a"), np.array(2.5)):
        path = save(tmp_path / "a.npz", images=IMAGES, labels=LABELS, factor=factor, mean=0, std=1)
        assert pixels_of(load_source(f"npz:{path}")) == EXPECTED


@pytest.mark.parametrize("block", [5 * IMAGES[0].size, IMAGES[0].size - 1])  # of 24 images
def test_images_are_read_in_blocks_and_one_may_be_larger(tmp_path, monkeypatch, block):
    monkeypatch.setattr(npz, "_BLOCK", block)
    assert pixels_of(load_source(f"npz:{save(tmp_path / 'a.npz', images=IMAGES, labels=LABELS)}")) == EXPECTED


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "holds the arrays images; expected images and labels, named as in"),
        ({"images": IMAGES / 255.0, "labels": LABELS}, "float64 .*expected uint8"),
        ({"images": IMAGES[0], "labels": LABELS}, "an integer for each of the 12 images"),
        ({"images": IMAGES[..., :2], "labels": LABELS}, "expected uint8"),
        ({"images": IMAGES[:, None], "labels": LABELS}, r"\[24, 1, 12, 12, 3\]; expected uint8"),
        ({"images": IMAGES[:, :0], "labels": LABELS}, r"\[24, 0, 12, 3\]; expected uint8"),
        ({"images": np.uint8(7), "labels": LABELS}, r"uint8 \[\]; expected uint8"),
        ({"images": np.asfortranarray(IMAGES), "labels": LABELS}, "column by column"),
        (
            {"images": IMAGES, "labels": LABELS[:-1]},
            r"labels is int64 \[23\]; expected an integer for each of the 24",
        ),
        ({"images": IMAGES, "labels": LABELS / 1.0}, "labels is float64"),
        (
            {"images": IMAGES, "labels": LABELS, "factor": np.int64(2), "mean": (0.5,), "std": (0.5,)},
            "a distilled set with 2 x 2 tiles",
        ),
        ({"images": IMAGES, "labels": np.where(LABELS == 0, -1, LABELS)}, r"label -1 is not in 0 to"),
        ({"images": IMAGES, "labels": LABELS + 1, "classes": np.array(CLASSES)}, r"label 4 is not in 0 to 3"),
        (
            {"images": IMAGES, "labels": LABELS, "classes": np.array(["a", "b", "c", "c"])},
            "4 class names; expected two or more, all different; more than once: 'c'",
        ),
        ({"images": IMAGES, "labels": LABELS.astype(object)}, "Object arrays cannot be loaded"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, arrays, message):
    with pytest.raises(SourceError, match=message):
        load_source(f"npz:{save(tmp_path / 'a.npz', **arrays)}")


@pytest.mark.parametrize("content", [b"", b"PK no zip"])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(SourceError, match=r"a\.npz cannot be read"):
        load_source(f"npz:{tmp_path / 'a.npz'}")
    with pytest.raises(SourceError, match=r"b\.npz cannot be read"):
        load_source(f"npz:{tmp_path / 'b.npz'}")


def test_a_file_with_damaged_bytes_is_refused(tmp_path):
    path = save(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
    flip(path, 2000)
    with pytest.raises(SourceError, match=r"a\.npz, array images: .*CRC"):
        load_source(f"npz:{path}")


def test_an_array_of_the_later_version_of_the_format_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name, array in (("images", IMAGES), ("labels", LABELS)):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, version=(2, 0))
    assert pixels_of(load_source(f"npz:{tmp_path / 'a.npz'}")) == EXPECTED


def test_an_array_shorter_than_its_header_says_is_refused(tmp_path):
    file = io.BytesIO()
    np.save(file, IMAGES)
    labels = io.BytesIO()
    np.save(labels, LABELS)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", file.getvalue()[:-100])
        archive.writestr("labels.npy", labels.getvalue())
    with pytest.raises(SourceError, match="it ends after 0 of 24 images"):
        load_source(f"npz:{tmp_path / 'a.npz'}")
