"""The artifact format: bytes pinned, reading partial or whole, everything unusable refused by name."""

import dataclasses
import errno
import functools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from artifacts import make_artifact
from safetensors.torch import save, save_file

from distilled_data import Artifact, FormatError, Metadata, NewerFormatError, OutputError, UsageError
from distilled_data import format as f

GOLDEN = Path(__file__).parent / "golden" / "format-v1.safetensors"
GOLDEN_CONTENT_HASH = "d33a6eddc47513304deb53e4eba8633277988e6a329a34c004309bec17fd41e2"


@pytest.fixture
def path(tmp_path, artifact) -> Path:
    f.write_artifact(tmp_path / f.ARTIFACT_FILE, artifact)
    return tmp_path / f.ARTIFACT_FILE


def metadata_json(artifact: Artifact, **changes) -> str:
    return json.dumps(json.loads(artifact.metadata.to_json()) | changes)


def test_written_bytes_equal_the_golden_file(path):
    assert path.read_bytes() == GOLDEN.read_bytes()


def test_golden_file_reads_back_as_what_was_written(artifact):
    read = f.read_artifact(GOLDEN)
    assert torch.equal(read.images, artifact.images)
    assert torch.equal(read.logits, artifact.logits)
    assert read.metadata == artifact.metadata
    assert read.content_hash == GOLDEN_CONTENT_HASH


def test_another_process_writes_the_same_bytes(path, tmp_path):
    code = (
        "import sys; from distilled_data import format as f;"
        "f.write_artifact(sys.argv[2], f.read_artifact(sys.argv[1]))"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(path), str(tmp_path / seed)],
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        assert (tmp_path / seed).read_bytes() == path.read_bytes()


def test_content_hash_ignores_metadata_and_sees_every_byte_shape_and_name(artifact):
    other = dataclasses.replace(artifact, metadata=dataclasses.replace(artifact.metadata, dataset="other"))
    assert other.content_hash == artifact.content_hash
    images = artifact.images.clone()
    images[2, 3, 0, 5, 5] ^= 1
    assert dataclasses.replace(artifact, images=images).content_hash != artifact.content_hash
    assert dataclasses.replace(artifact, logits=None).content_hash != artifact.content_hash


def test_reading_ipc_k_gives_the_first_k_ranks(path, artifact):
    part = f.read_artifact(path, ipc=2)
    assert torch.equal(part.images, artifact.images[:2])
    assert torch.equal(part.logits, artifact.logits[:2])
    assert part.metadata.ipc == 2


def test_reading_classes_renumbers_images_and_both_class_axes_of_the_logits(path, artifact):
    part = f.read_artifact(path, classes=["dog", 1])
    assert part.metadata.classes == ("dog", "bee")
    assert torch.equal(part.images, artifact.images[:, [3, 1]])
    assert part.logits[1, 0, 2].tolist() == artifact.logits[1, 3, 2, [3, 1]].tolist()


@pytest.mark.parametrize("classes", [["ant"], ["ant", "ant"], [0, 9], []])
def test_fewer_than_two_different_classes_are_refused(path, classes):
    with pytest.raises(UsageError):
        f.read_artifact(path, classes=classes)


@pytest.mark.parametrize("classes", [5, "ant", {"ant", "bee"}])
def test_what_is_no_list_of_classes_is_refused(path, classes):
    with pytest.raises(UsageError, match="several names or indices"):
        f.read_artifact(path, classes=classes)


def test_the_tensors_of_a_whole_artifact_are_the_memory_that_was_hashed(path):
    content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    for tensor in f.read_artifact(path, content=content).tensors.values():
        assert tensor.untyped_storage().data_ptr() == content.data_ptr()


def test_tensors_that_lie_otherwise_in_memory_are_written(artifact, tmp_path):
    turned = dataclasses.replace(artifact, images=artifact.images.transpose(3, 4))
    f.write_artifact(tmp_path / "turned", turned)
    assert torch.equal(f.read_artifact(tmp_path / "turned").images, artifact.images.transpose(3, 4))


def test_logits_as_a_teacher_gives_them_are_numbers_alone(artifact, tmp_path):
    graph = artifact.logits.clone().requires_grad_() * 1
    made = dataclasses.replace(artifact, logits=graph)
    f.write_artifact(tmp_path / "made", made)
    assert made.content_hash == artifact.content_hash
    assert not made.logits.requires_grad


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_a_truncated_file_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=str(path)):
        f.read_artifact(path)


def test_a_foreign_safetensors_file_is_named_as_one(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="another kind"):
        f.read_artifact(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [b"<!doctype html><title>404</title>", b"\x80\x04pickle", b"\xff" * 64])
def test_a_file_that_is_not_safetensors_is_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        f.read_artifact(tmp_path / "a")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        f.read_artifact(tmp_path / "nothing")
    with pytest.raises(FormatError):
        f.read_artifact(tmp_path)


def test_a_newer_format_says_to_upgrade(tmp_path, artifact):
    (tmp_path / "a").write_bytes(
        save(artifact.tensors, {f.METADATA_KEY: metadata_json(artifact, format_version=2)})
    )
    with pytest.raises(NewerFormatError, match="Upgrade"):
        f.read_artifact(tmp_path / "a")


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 0},
        {"format_version": "1"},
        {"decode": {}},
        {"value_range": [0, 1]},
        {"surprise": 1},
        {"classes": ["a", "a", "b", "c"]},
        {"classes": "abcd"},
        {"mean": [0.5, 0.5]},
        {"std": [0]},
        {"std": [1e-31]},
        {"std": ["0.5"]},
        {"ipc": 0},
        {"ipc": 2.0},
        {"ipc": True},
        {"ipc": 4},
        {"factor": 4},
        {"channels": 2},
        {"height": 12},
        {"dataset": ""},
        {"labels": []},
        {"results": [1]},
        {"mean": [10**400]},
        {"format_version": True},
    ],
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path, artifact, changes):
    (tmp_path / "a").write_bytes(save(artifact.tensors, {f.METADATA_KEY: metadata_json(artifact, **changes)}))
    with pytest.raises(FormatError):
        f.read_artifact(tmp_path / "a")


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": True},
        {"ipc": 3.0},
        {"height": 6.0},
        {"width": 6.0},
        {"factor": 2.0},
        {"factor": 128, "height": 128, "width": 128},
        {"classes": ["ant"]},
    ],
)
def test_metadata_that_only_its_tensors_would_fit_is_refused(artifact, changes):
    with pytest.raises(FormatError, match="artifact metadata: "):
        dataclasses.replace(artifact.metadata, **changes)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"ipc":1,"ipc":2}', '{"a":' * 5000])
def test_metadata_that_is_not_one_json_object_is_refused(text):
    with pytest.raises(FormatError):
        Metadata.from_json(text)


@pytest.mark.parametrize(
    "tensors",
    [
        {"images": torch.zeros(3, 4, 1, 6, 6)},
        {"images": torch.zeros(3, 4, 1, 6, 5, dtype=torch.uint8)},
        {"images": torch.zeros(144, dtype=torch.uint8)},
        {"logits": torch.zeros(3, 4, 4, 4)},
        {"logits": torch.full((3, 4, 4, 4), torch.nan, dtype=torch.float16)},
        {"logits": torch.zeros(2, 4, 4, 4, dtype=torch.float16)},
        {"logits": torch.tensor(0.0, dtype=torch.float16)},
        {"more": torch.zeros(1)},
    ],
)
def test_tensors_that_do_not_fit_the_metadata_are_refused(tmp_path, artifact, tensors):
    content = save(artifact.tensors | tensors, {f.METADATA_KEY: artifact.metadata.to_json()})
    (tmp_path / "a").write_bytes(content)
    refuse(tmp_path / "a")


def refuse(path):
    for options in (
        {},
        {"ipc": 1},
        {"content": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)},
    ):
        with pytest.raises(FormatError):
            f.read_artifact(path, **options)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "BOOL"])
def test_tensors_of_any_other_kind_are_refused(tmp_path, artifact, dtype):
    bits = {"F4": 4, "F6_E2M3": 6}.get(dtype, 8)
    shape = list(artifact.images.shape)
    size = artifact.images.numel() * bits // 8
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    write_raw(tmp_path / "a", {f.METADATA_KEY: artifact.metadata.to_json()}, entry, size)
    refuse(tmp_path / "a")


def test_metadata_of_nothing_is_refused(tmp_path):
    write_raw(tmp_path / "a", None, {"dtype": "U8", "shape": [6], "data_offsets": [0, 6]}, 6)
    refuse(tmp_path / "a")


def write_raw(path, metadata, images, size):
    header = json.dumps({"__metadata__": metadata, "images": images}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


def test_half_a_character_is_refused_before_anything_is_written(tmp_path, artifact):
    classes = ("caf\udce9", *artifact.metadata.classes[1:])
    odd = dataclasses.replace(artifact, metadata=dataclasses.replace(artifact.metadata, classes=classes))
    with pytest.raises(FormatError, match="surrogates not allowed"):
        f.write_artifact(tmp_path / "a", odd)
    assert list(tmp_path.iterdir()) == []


def test_metadata_that_are_nested_too_deeply_to_be_written_are_refused(tmp_path, artifact):
    deep = functools.reduce(lambda inner, _: {"a": inner}, range(5000), {})
    metadata = dataclasses.replace(artifact.metadata, source=deep)
    with pytest.raises(FormatError, match="cannot be written as JSON: maximum recursion"):
        f.write_artifact(tmp_path / f.ARTIFACT_FILE, dataclasses.replace(artifact, metadata=metadata))


def test_an_error_of_metadata_is_not_as_long_as_they_are(artifact):
    with pytest.raises(FormatError) as caught:
        dataclasses.replace(artifact.metadata, classes=("a" * 10**6, ""))
    assert len(str(caught.value)) < 1000


def test_metadata_that_nobody_could_read_are_refused_before_anything_is_written(path, artifact, monkeypatch):
    length = int.from_bytes(path.read_bytes()[:8], "little")
    monkeypatch.setattr(f, "MAX_HEADER", length)
    f.write_artifact(path, artifact)
    assert f.read_artifact(path).metadata == artifact.metadata
    before = path.read_bytes()
    longer = dataclasses.replace(artifact.metadata, source={"citation": "one more"})
    with pytest.raises(FormatError, match=f"header of .* bytes; the format allows {length}"):
        f.write_artifact(path, dataclasses.replace(artifact, metadata=longer))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_pickled_set_is_as_large_as_its_tensors(tmp_path):
    large = make_artifact(ipc=20)
    f.write_artifact(tmp_path / "a", large)
    content = torch.frombuffer(bytearray((tmp_path / "a").read_bytes()), dtype=torch.uint8)
    read = f.read_artifact(tmp_path / "a", content=content)
    size = sum(tensor.nbytes for tensor in large.tensors.values())
    assert size < len(pickle.dumps(read)) < 1.2 * size
    again = pickle.loads(pickle.dumps(read))
    assert again.content_hash == large.content_hash
    assert again.metadata == large.metadata


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path, artifact, monkeypatch):
    old = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="Free some space"):
        f.write_artifact(path, dataclasses.replace(artifact, logits=None))
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": {"temperature": 0}},
        {"labels": {"temperature": -1.0}},
        {"labels": {"temperature": 1e-40}},
        {"labels": {"temperature": 1e30}},
        {"labels": {"temperature": "1"}},
        {"source": []},
        {"recipe": []},
        {"dataset": 3},
        {"classes": ["", "b", "c", "d"]},
        {"classes": [1, "b", "c", "d"]},
        {"height": 0},
    ],
)
def test_a_value_of_the_metadata_that_makes_no_sense_is_named(artifact, changes):
    fields = "labels.temperature|source|recipe|dataset|classes|height"
    with pytest.raises(FormatError, match=f"artifact metadata: ({fields}) must be"):
        Metadata.from_json(metadata_json(artifact, **changes))


def test_labels_that_are_no_object_are_told_from_a_temperature(artifact):
    with pytest.raises(FormatError, match=r"artifact metadata: labels must be an object, got \[\]"):
        Metadata.from_json(metadata_json(artifact, labels=[]))


def test_a_field_of_the_metadata_that_is_there_twice_is_refused(artifact):
    text = artifact.metadata.to_json()
    with pytest.raises(FormatError, match="twice"):
        Metadata.from_json(text.replace('"std"', '"mean":[0.1],"std"'))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what is mapped")
def test_the_error_of_a_file_of_other_shapes_does_not_keep_it_mapped(path):
    path.write_bytes(path.read_bytes().replace(b'"U8"', b'"I8"'))
    with pytest.raises(FormatError, match=r"expected .'U8'") as caught:  # whose traceback holds what it met
        f.read_artifact(path)
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert caught.value
