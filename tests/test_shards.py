"""WebDataset shards as a source: what is in them comes out, and what is wrong with them is named."""

import bz2
import gzip
import http.server
import json
import re
import shutil
import sys
import tarfile
import threading
from pathlib import PureWindowsPath

import numpy as np
import pytest
import torch
from artifacts import flip
from photographs import CLASSES, by_pixels, encoded, photographs, pixels_of, write_shards, write_tar

from distilled_data.errors import MissingExtraError, SourceError, UsageError
from ncfm_engine.sources import load_source
from ncfm_engine.sources.reader import Damage, Record
from ncfm_engine.sources.shards import ShardReader

IMAGES, LABELS = photographs(6)
PNG = encoded(IMAGES[0])


def read(path, classes=None) -> list[Record | Damage]:
    reader = ShardReader(str(path), classes)
    return [found for unit in reader.units for found in reader.read(unit)]


def sample(key: str, label: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", PNG), (f"{key}.cls", b"%d" % label)]


def damage(path, classes=None) -> list[tuple[str, str]]:
    return [(found.name, found.reason) for found in read(path, classes) if isinstance(found, Damage)]


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize(
    ("label", "content", "expected"),
    [
        ("cls", b"3", 3),
        ("cls", b" 12\n", 12),
        ("cls", b"leaf", "leaf"),
        ("json", b'{"label": 3, "other": 1}', 3),
        ("json", b'{"label": "leaf"}', "leaf"),
        ("json", b'{"cls": 0}', 0),
        ("json", b'{"class": 1, "cls": 2, "label": 3}', 3),
        ("json", b'{"class": 7}', 7),
        ("CLS", b"3", 3),
    ],
)
def test_a_sample_is_an_image_and_its_label(tmp_path, kind, label, content, expected):
    image = encoded(IMAGES[1], kind)
    write_tar(tmp_path / "a.tar", [(f"0.{kind}", image), (f"0.{label}", content), ("0.txt", b"a caption")])
    assert read(tmp_path / "a.tar") == [Record("a.tar/0", expected, image)]


def test_files_of_a_sample_that_are_neither_image_nor_label_are_not_read(tmp_path, monkeypatch):
    read_files, extract = [], tarfile.TarFile.extractfile
    monkeypatch.setattr(
        tarfile.TarFile,
        "extractfile",
        lambda self, entry: read_files.append(entry.name) or extract(self, entry),
    )
    write_tar(tmp_path / "a.tar", [*sample("0", 2), *((f"0.x{number}", bytes(9)) for number in range(3))])
    assert read(tmp_path / "a.tar") == [Record("a.tar/0", 2, PNG)]
    assert read_files == ["0.png", "0.cls"]


def test_a_class_that_no_artifact_can_hold_is_refused(tmp_path):
    files = [
        (f"{n}.{kind}", text)
        for n, label in enumerate("aabb")
        for kind, text in (("png", encoded(IMAGES[n])), ("json", b'{"label": "%s\\ud800"}' % label.encode()))
    ]
    with pytest.raises(SourceError, match=r"has a class named 'a\\ud800'; expected a text that is UTF-8"):
        load_source(f"wds:{write_tar(tmp_path / 'a.tar', files)}")


def test_a_label_of_its_own_counts_more_than_one_among_other_facts(tmp_path):
    files = [("0.json", b'{"label": 1}'), *sample("0", 2)]
    assert read(write_tar(tmp_path / "a.tar", files)) == [Record("a.tar/0", 2, PNG)]


def test_all_samples_of_all_shards_are_read_whatever_names_them(tmp_path):
    write_shards(tmp_path, IMAGES, LABELS, shards=3)
    expected = sorted(label for label in LABELS.tolist())
    for pattern in ("*.tar", "train-{00000..00002}.tar", "train-0000[012].tar"):
        assert sorted(found.label for found in read(tmp_path / pattern)) == expected
    both = f"{tmp_path}/train-00000.tar::{tmp_path}/train-00001.tar"
    assert len(read(both)) == 16


def test_classes_txt_beside_the_shards_names_the_classes_in_order(tmp_path):
    write_shards(tmp_path, IMAGES, LABELS)
    assert load_source(f"wds:{tmp_path}/*.tar").classes == CLASSES
    (tmp_path / "others.txt").write_text("d\nc\nb\na\n")
    assert load_source(f"wds:{tmp_path}/*.tar", classes=tmp_path / "others.txt").classes == tuple("dcba")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES[::-1]))
    assert load_source(f"wds:{tmp_path}/*.tar").classes == CLASSES[::-1]
    (tmp_path / "classes.txt").unlink()
    assert load_source(f"wds:{tmp_path}/*.tar").classes == tuple("0123")


def test_labels_that_are_names_make_classes_in_the_order_of_their_names(tmp_path):
    files = [
        file
        for row, label in enumerate(["pear", "fig", "pear", "fig"])
        for file in (
            (f"{row}.png", encoded(IMAGES[row])),
            (f"{row}.json", json.dumps({"label": label}).encode()),
        )
    ]
    write_tar(tmp_path / "a.tar", files)
    source = load_source(f"wds:{tmp_path}/a.tar")
    assert source.classes == ("fig", "pear")
    assert pixels_of(source) == by_pixels(IMAGES[:4], np.array([1, 0, 1, 0]))


def test_labels_that_are_names_get_their_place_in_classes_txt(tmp_path):
    names = ["pear", "fig", "pear", "fig"]
    files = [
        file
        for row, name in enumerate(names)
        for file in ((f"{row}.png", encoded(IMAGES[row])), (f"{row}.cls", name.encode()))
    ]
    write_tar(tmp_path / "a.tar", [("README", b"made by hand"), *files])
    (tmp_path / "classes.txt").write_text("pear\nfig\n")
    source = load_source(f"wds:{tmp_path}/a.tar")
    assert source.classes == ("pear", "fig")
    assert pixels_of(source) == by_pixels(IMAGES[:4], np.array(names) == "fig")


def test_a_single_class_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [*sample("0"), *sample("1")])
    with pytest.raises(SourceError, match="has one class, '0'; expected two or more"):
        load_source(f"wds:{tmp_path}/a.tar")


@pytest.mark.parametrize("name", ["test", "val"])
def test_shards_named_so_hold_the_test_images(tmp_path, name):
    write_shards(tmp_path, IMAGES[:16], LABELS[:16])
    write_shards(tmp_path, IMAGES[16:], LABELS[16:], shards=1, part=name)
    source = load_source(f"wds:{tmp_path}/*.tar")
    assert (len(source.train), len(source.test)) == (16, 8)
    with pytest.raises(UsageError, match="at least one must be for training"):
        load_source(f"wds:{tmp_path}/{name}*.tar")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("flowers-train-0.tar", "flowers-validation-0.tar"),
        ("train/0.tar", "test/0.tar"),
        ("Train-0.tar", "Test-0.tar"),
        ("train-0.tar", "eval-0.tar"),
        ("0.tar", "0_dev.tar"),
        ("valley-0.tar", "valid-0.tar"),
        ("dev-kit-train-0.tar", "testdata-0.tar"),
        ("trainset-0.tar", "valset-0.tar"),
        ("trainA-0.tar", "testB-0.tar"),
        ("val/train-0.tar", "train/val-0.tar"),
    ],
)
def test_a_word_in_its_name_or_the_folder_s_tells_what_a_shard_is_for(tmp_path, train, test):
    for name in (train, test):
        write_tar(tmp_path / name, sample("0"))
    reader = ShardReader("::".join(str(tmp_path / name) for name in (train, test)))
    assert [unit.part for unit in reader.units] == ["train", "test"]
    assert reader.origin.name == tmp_path.name


def test_a_shard_for_testing_leaves_those_for_validation_out_and_a_query_says_nothing():
    url = "https://host/data/{train,val,test}-0.tar?token=dev"
    units = ShardReader(url).units
    assert [(unit.part, unit.what[0][18:23]) for unit in units] == [("train", "train"), ("test", "test-")]


def test_the_source_is_named_after_the_folder_and_tells_no_path(tmp_path):
    write_shards(tmp_path / "flowers", IMAGES, LABELS)
    origin = load_source(f"wds:{tmp_path}/flowers/*.tar").origin
    assert (origin.name, origin.id) == ("flowers", "wds:flowers")


def test_shards_are_opened_by_url(tmp_path):
    write_shards(tmp_path, IMAGES, LABELS, shards=1)
    assert len(read(f"file:{tmp_path}/train-00000.tar")) == len(IMAGES)
    assert len(read(f"pipe:cat {tmp_path}/train-00000.tar")) == len(IMAGES)
    with pytest.raises(SourceError, match=r"the shard pipe:cat /nowhere\.tar cannot be read: .*exit 1"):
        read("pipe:cat /nowhere.tar")
    with pytest.raises(SourceError, match=r"the shard is cut or damaged|cannot be read"):
        load_source("wds:gopher://host/a.tar")


@pytest.mark.parametrize("drive", ["c", "C"])
def test_a_path_of_windows_is_no_url_and_its_folders_are_not_its_name(drive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ncfm_engine.sources.shards.PurePath", PureWindowsPath)
    write_tar(tmp_path / f"{drive}:\\test\\a.tar", sample("0"))
    reader = ShardReader(f"{drive}:\\test\\a.tar")
    assert [unit.part for unit in reader.units] == ["train"]
    assert [record.label for record in reader.read(reader.units[0])] == [0]


def test_missing_shards_are_named(tmp_path):
    with pytest.raises(SourceError, match="names no file"):
        read(tmp_path / "*.tar")
    write_shards(tmp_path, IMAGES, LABELS, shards=1)
    with pytest.raises(SourceError, match=r"names .*train-00001\.tar, which is not there"):
        read(tmp_path / "train-{00000..00001}.tar")


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.gopen", None)
    with pytest.raises(MissingExtraError, match=r"'webdataset'.*distilled-data\[data\]"):
        read(tmp_path / "*.tar")


# What is wrong with a sample


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("0.png", PNG)], r"no label: expected \.cls or \.json"),
        ([("0.png", PNG), ("0.json", b"{}")], "None is neither a number nor a name"),
        ([("0.png", PNG), ("0.json", b'{"label": 1.5}')], "1.5 is neither"),
        ([("0.png", PNG), ("0.json", b'{"label": true}')], "True is neither"),
        ([("0.png", PNG), ("0.json", b"{")], "no label: "),
        ([("0.png", PNG), ("0.json", b"[" * 10**6)], "no label: "),
        ([("0.png", PNG), ("0.json", b"5")], "None is neither"),
        ([*sample("0"), ("0.PNG", PNG)], "the key is there twice"),
        ([("0.png", PNG), ("0.cls", b"")], "'' is neither"),
        ([("0.png", PNG), ("0.cls", b"\xff\xfe")], "no label: "),
        ([("0.cls", b"1"), ("0.txt", b"x")], "no image; it has cls, txt"),
        ([("0.jpg", PNG), *sample("0")], "the images png and jpg; it has cls, jpg, png, expected one"),
        ([("0.png", PNG), ("0.cls", b"1"), ("0.cls", b"2")], "the key is there twice"),
        ([*sample("0"), *sample("1"), *sample("0", 1)], "the key is there twice"),
        ([("../0.png", PNG), ("../0.cls", b"1")], "leads out of the archive"),
        ([("a/../../0.png", PNG)], "leads out of the archive"),
        ([("/etc/0.png", PNG)], "leads out of the archive"),
    ],
)
def test_a_sample_that_is_not_one_is_named_with_the_reason(tmp_path, files, reason):
    write_tar(tmp_path / "a.tar", [*sample("good"), *files])
    found = damage(tmp_path / "a.tar")
    assert found
    assert all(name.startswith("a.tar/") for name, _ in found)
    assert all(re.search(reason, text) for _, text in found)
    assert Record("a.tar/good", 0, PNG) in read(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_a_link_or_a_device_in_a_shard_is_refused(tmp_path, kind):
    write_tar(tmp_path / "a.tar", sample("good"))
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        entry = tarfile.TarInfo("bad.png")
        entry.type, entry.linkname = kind, "/etc/passwd"
        archive.addfile(entry)
    assert damage(tmp_path / "a.tar") == [("a.tar/bad.png", "a link or a device, not a file")]


def test_a_file_that_claims_to_be_huge_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("ncfm_engine.sources.shards.MAX_BYTES", 100)
    write_tar(tmp_path / "a.tar", [("0.png", bytes(101)), ("0.cls", b"1")])
    assert "101 bytes, more than 100" in damage(tmp_path / "a.tar")[0][1]


@pytest.mark.parametrize("label", [b"4", b"-1", b"999999999999"])
def test_a_label_out_of_range_is_refused(tmp_path, label):
    write_shards(tmp_path, IMAGES, LABELS, shards=1)
    write_tar(tmp_path / "train-00001.tar", [("bad.png", PNG), ("bad.cls", label)])
    with pytest.raises(
        SourceError, match=rf"train-00001\.tar/bad \(label {label.decode()} is not in 0 to 3\)"
    ):
        load_source(f"wds:{tmp_path}/*.tar")


def test_a_name_that_is_no_class_is_refused(tmp_path):
    write_shards(tmp_path, IMAGES, LABELS, shards=1)
    write_tar(tmp_path / "train-00001.tar", [("bad.png", PNG), ("bad.cls", b"moss")])
    with pytest.raises(SourceError, match="label 'moss' is none of the 4 classes"):
        load_source(f"wds:{tmp_path}/*.tar")


def test_labels_with_a_gap_are_refused_where_nothing_names_the_classes(tmp_path):
    write_shards(tmp_path, IMAGES, np.where(LABELS == 3, 1_000_000, LABELS), shards=1)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(
        SourceError,
        match=r"4 different labels, up to 1000000; there is no image with the label 3.* number them anew",
    ):
        load_source(f"wds:{tmp_path}/*.tar")


def test_numbers_and_names_together_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [*sample("0"), *sample("1", 1), ("2.png", PNG), ("2.cls", b"fig")])
    with pytest.raises(
        SourceError, match="labels that are numbers and labels that are names, such as 0 and 'fig'"
    ):
        load_source(f"wds:{tmp_path}/a.tar")


# What is wrong with a shard


def test_a_shard_cut_anywhere_is_named_and_its_whole_samples_are_read(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [file for key in range(4) for file in sample(str(key), key)])
    content, samples = whole.read_bytes(), read(whole)
    assert len(samples) == 4
    ends = len(content.rstrip(b"\0")) // 512 + 1  # in blocks; two of zeros follow, and padding
    for size in [0, 1, 100, *range(512, ends * 512 + 1, 512), ends * 512 - 1]:
        whole.write_bytes(content[:size])
        *records, last = read(whole)
        assert isinstance(last, Damage), size
        assert (last.name, "cut or damaged" in last.reason) == ("a.tar", True)
        assert records == samples[: len(records)], size  # none of them lacks a part of itself
    whole.write_bytes(content[: (ends + 1) * 512])  # a single block of zeros will do
    assert read(whole) == samples


def test_a_compressed_shard_is_read_and_cut_it_is_named(tmp_path):
    files = [file for key in range(4) for file in sample(str(key), key)]
    whole = write_tar(tmp_path / "a.tar.gz", files, "w:gz")
    assert len(read(whole)) == 4
    content = whole.read_bytes()
    for size in (10, len(content) // 2, len(content) - 100):
        whole.write_bytes(content[:size])
        assert "cut or damaged" in damage(whole)[-1][1]
    plain = gzip.decompress(content)
    whole.write_bytes(gzip.compress(plain[: 5 * 512]))
    assert "cut or damaged" in damage(whole)[-1][1]


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", [file for key in range(4) for file in sample(str(key), key)])
    flip(path, path.read_bytes().index(b"2.png"))  # its checksum no longer holds
    assert [type(found) for found in read(path)] == [Record, Damage]  # the one before may lack a part
    assert "bad checksum" in read(path)[-1].reason


@pytest.mark.parametrize("compressed", [lambda content: content, gzip.compress, bz2.compress])
def test_what_follows_the_end_of_an_archive_is_named(tmp_path, compressed):
    content = write_tar(tmp_path / "a.tar", sample("0")).read_bytes()
    path = tmp_path / "b.tar"
    path.write_bytes(compressed(content + bytes(2**21)))
    assert read(path) == [Record("b.tar/0", 0, PNG)]
    for more in (compressed(content + bytes(2**21) + content), 2 * compressed(content)):
        path.write_bytes(more)
        [(name, reason)] = damage(path)
        assert name == "b.tar"
        assert re.match("more follows the end of the archive|.*End of stream", reason)


def test_a_shard_of_several_gzip_files_is_read_whole(tmp_path):
    content = write_tar(tmp_path / "a.tar", sample("0")).read_bytes()
    path = tmp_path / "b.tar"
    path.write_bytes(gzip.compress(content[:700]) + gzip.compress(content[700:]) + bytes(512))
    assert read(path) == [Record("b.tar/0", 0, PNG)]


def test_samples_before_stray_bytes_are_read(tmp_path):
    files = [file for key in range(4) for file in sample(str(key), key)]
    content = write_tar(tmp_path / "a.tar.gz", files, "w:gz").read_bytes()
    path = tmp_path / "b.tar.gz"
    path.write_bytes(content + b"stray")
    *samples, last = read(path)
    assert [type(found) for found in samples] == [Record] * 4
    assert "cut or damaged" in last.reason


def test_what_macos_puts_beside_files_is_left_out(tmp_path):
    files = [(f"d/{name}", body) for name, body in sample("0")]
    beside = [(f"d/._{name}", b"Mac") for name, _ in sample("0")]
    path = write_tar(tmp_path / "a.tar", [*beside[:1], *files[:1], *beside[1:], *files[1:]])
    assert read(path) == [Record("a.tar/d/0", 0, PNG)]


def test_a_header_that_claims_to_be_huge_is_refused_before_it_is_read(tmp_path):
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 2**33
    zeros = gzip.compress(bytes(2**20))
    with (tmp_path / "a.tar.gz").open("wb") as file:
        file.write(gzip.compress(entry.tobuf(tarfile.GNU_FORMAT)) + zeros)
    assert "a header of 8589934592 bytes" in damage(tmp_path / "a.tar.gz")[0][1]


def test_a_header_of_headers_without_end_is_named(tmp_path):
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 5
    (tmp_path / "a.tar").write_bytes(3000 * (entry.tobuf(tarfile.GNU_FORMAT) + b"long".ljust(512, b"\0")))
    assert "cut or damaged after 0 samples" in damage(tmp_path / "a.tar")[0][1]


def test_a_large_image_and_a_long_name_are_no_large_header(tmp_path, monkeypatch):
    image, key = encoded(IMAGES[0], "bmp"), "long" * 40
    monkeypatch.setattr("ncfm_engine.sources.shards.MAX_EXTENSION", len(image) - 1)
    write_tar(tmp_path / "a.tar", [(f"{key}.bmp", image), (f"{key}.cls", b"0")])
    assert read(tmp_path / "a.tar") == [Record(f"a.tar/{key}", 0, image)]


@pytest.mark.parametrize(
    ("shard", "name"),
    [
        ("https://user:secret@host/data/flowers/a.tar?token=1", "flowers"),
        ("https://user:secret@host/data/flowers/Train/a.tar", "flowers"),
        ("https://user:secret@host/a.tar", "shards"),
        ("pipe:cat /home/alice/a.tar", "shards"),
    ],
)
def test_the_name_of_a_remote_source_tells_no_secret(shard, name):
    assert ShardReader(shard).origin.id == f"wds:{name}"


def test_what_is_no_tar_file_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(PNG * 20)
    assert "cut or damaged after 0 samples" in damage(tmp_path / "a.tar")[0][1]


def test_skip_damaged_keeps_what_came_before_the_cut(tmp_path):
    write_shards(tmp_path, IMAGES, LABELS, shards=2)
    path = tmp_path / "train-00001.tar"
    path.write_bytes(path.read_bytes()[: 512 * 23])
    with pytest.raises(SourceError, match=r"1 of .* cannot be used: train-00001\.tar \(the shard is cut"):
        load_source(f"wds:{tmp_path}/*.tar")
    with pytest.warns(UserWarning, match=r"left out 1 of .*train-00001\.tar"):
        source = load_source(f"wds:{tmp_path}/*.tar", skip_damaged=True)
    assert 12 < len(source.train) + len(source.test) < 24
    assert pixels_of(source).items() <= by_pixels(IMAGES, LABELS).items()
    assert torch.equal(source.train.counts > 0, torch.ones(4, dtype=torch.bool))


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset opens http by curl")
def test_shards_are_read_over_http_and_a_connection_that_breaks_is_named(tmp_path):
    write_shards(tmp_path, IMAGES, LABELS, shards=2)

    class Server(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *arguments):
            pass

        def copyfile(self, source, target):
            target.write(source.read()[: 4096 if "broken" in self.path else None])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        found = read(f"{url}/train-{{00000..00001}}.tar")
        for name in ("train-00000.tar?broken", "train-00009.tar"):
            with pytest.raises(SourceError, match=r"the shard .* cannot be read: .* Run the command again"):
                read(f"{url}/{name}")
        server.shutdown()
    assert [type(record) for record in found] == [Record] * len(IMAGES)


def test_shards_are_found_in_the_home_folder_and_in_one_with_brackets(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "data [v2]"
    folder.mkdir()
    write_tar(folder / "train-000.tar", sample("0"))
    write_tar(tmp_path / "b.tar", sample("1"))
    assert len(read(folder / "train-000.tar")) == 1
    assert len(read("~/b.tar")) == 1
