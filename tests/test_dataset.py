"""DistilledDataset: what it loads, in which order, with which labels, and what it refuses to load."""

import dataclasses
import hashlib
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from artifacts import flip, make_artifact
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Subset

from distilled_data import (
    Artifact,
    DistilledDataError,
    DistilledDataset,
    FormatError,
    IntegrityError,
    Metadata,
    MissingExtraError,
    UnknownNameError,
    UsageError,
    dataset,
    manifest,
)
from distilled_data import format as f
from distilled_data.augment import DSA
from distilled_data.labels import soften
from distilled_data.manifest import read_manifest, replace_artifact, write_manifest


def write(folder: Path, artifact: Artifact) -> Path:
    f.write_artifact(folder / f.ARTIFACT_FILE, artifact)
    (folder / f.PREVIEW_FILE).write_bytes(b"not looked at")
    write_manifest(folder)
    return folder


@pytest.fixture
def folder(tmp_path, artifact) -> Path:
    return write(tmp_path / "set", artifact)


@pytest.fixture
def whole(folder) -> DistilledDataset:
    return DistilledDataset.from_folder(folder)


def colour(factor: int) -> DistilledDataset:
    """Two ranks of three classes, three channels of 6x12 pixels, with logits and a mean for each channel."""
    generator = torch.Generator().manual_seed(factor)
    return DistilledDataset.from_tensors(
        torch.randint(256, (2, 3, 3, 6, 12), dtype=torch.uint8, generator=generator),
        classes=["red", "green", "blue"],
        logits=torch.randn(2, 3, factor**2, 3, generator=generator),
        factor=factor,
        mean=(0.1, 0.5, 0.9),
        std=(0.2, 0.3, 0.4),
        temperature=3.0,
    )


def weights(small: int, large: int) -> np.ndarray:
    """Linear interpolation from `small` to `large` pixels of the same whole, [large, small].

    A pixel is a sample at its centre; beyond the outermost centres the value stays.
    """
    result = np.zeros((large, small))
    for pixel in range(large):
        position = min(max((pixel + 0.5) * small / large - 0.5, 0), small - 1)
        below = int(position)
        above = min(below + 1, small - 1)
        result[pixel, below] += 1 - (position - below)
        result[pixel, above] += position - below
    return result


def reference_views(data: DistilledDataset) -> np.ndarray:
    """All views in 0..255, [rank, class, view, channels, height, width], one at a time in float64."""
    images, factor = data.artifact.images.double().numpy(), data.info.factor
    ipc, classes, channels, height, width = images.shape
    h, w = height // factor, width // factor
    views = np.empty((ipc, classes, factor**2, channels, height, width))
    for rank, label, view, channel in np.ndindex(views.shape[:4]):
        top, left = view // factor * h, view % factor * w
        tile = images[rank, label, channel, top : top + h, left : left + w]
        views[rank, label, view, channel] = weights(h, height) @ tile @ weights(w, width).T
    return views


# what is loaded


def test_a_folder_loads_as_it_was_written(folder, artifact):
    data = DistilledDataset.from_folder(str(folder))
    assert len(data) == 3 * 4 * 4
    assert data.info == artifact.metadata
    assert data.classes == ("ant", "bee", "cat", "dog")
    assert (data.ipc, data.mean, data.std) == (3, (0.5,), (0.25,))
    assert torch.equal(data.artifact.images, artifact.images)
    assert torch.equal(data.artifact.logits, artifact.logits)
    assert data.content_hash == artifact.content_hash == read_manifest(folder).content_hash
    assert data.transform is data.target_transform is None


@pytest.mark.parametrize("ipc", [1, 2, 3])
def test_images_up_to_k_of_the_file_are_what_ipc_k_loads(folder, ipc):
    stored = load_file(folder / f.ARTIFACT_FILE)
    data = DistilledDataset.from_folder(folder, ipc=ipc)
    assert data.ipc == data.info.ipc == ipc
    assert torch.equal(data.artifact.images, stored["images"][:ipc])
    assert torch.equal(data.artifact.logits, stored["logits"][:ipc])


@pytest.mark.parametrize("ipc", [1, 2])
def test_the_samples_of_a_smaller_ipc_are_a_prefix(folder, whole, ipc):
    part = DistilledDataset.from_folder(folder, ipc=ipc)
    assert len(part) == ipc * 4 * 4
    for sample, expected in zip(part, whole, strict=False):
        assert torch.equal(sample[0], expected[0])
        assert torch.equal(sample[1], expected[1])


def test_classes_are_renumbered_in_the_order_given(folder, whole):
    part = DistilledDataset.from_folder(folder, ipc=2, classes=["dog", 1], labels="logits")
    assert part.classes == ("dog", "bee")
    assert part.class_to_idx == {"dog": 0, "bee": 1}
    chosen = torch.arange(48).view(3, 4, 4)[:2, [3, 1]].flatten().tolist()
    assert torch.equal(part.images, whole.images[chosen])
    assert part.targets.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] * 2
    expected = whole.with_labels("logits").__getitems__(chosen)
    assert [label.tolist() for _, label in part] == [label[[3, 1]].tolist() for _, label in expected]


def test_soft_targets_of_some_classes_are_probabilities_among_these(folder):
    part = DistilledDataset.from_folder(folder, classes=["cat", "ant"])
    logits = part.artifact.logits.flatten(0, 2).float()
    assert torch.allclose(part.soft_targets, (logits / 2.0).softmax(1))


@pytest.mark.parametrize("ipc", [0, 4, -1])
def test_an_ipc_that_is_not_stored_is_refused(folder, whole, ipc):
    with pytest.raises(UsageError, match="holds 3 images per class"):
        DistilledDataset.from_folder(folder, ipc=ipc)
    with pytest.raises(UsageError, match="holds 3 images per class"):
        whole.select(ipc=ipc)


def test_an_unknown_class_is_refused_and_names_the_close_ones(folder, whole):
    with pytest.raises(UnknownNameError, match="Did you mean 'ant'"):
        DistilledDataset.from_folder(folder, classes=["aunt", "bee"])
    with pytest.raises(UnknownNameError, match="Did you mean 'ant'"):
        whole.select(classes=["aunt", "bee"])


def test_errors_about_a_thousand_classes_name_those_that_matter():
    names = [f"class {number}" for number in range(1000)]
    images = torch.zeros(1, 1000, 1, 2, 2, dtype=torch.uint8)
    data = DistilledDataset.from_tensors(images, names, mean=[0.5], std=[0.5])
    told = {
        r"Did you mean 'class 70'.* Known: class 0, class 1, .* class 101 and 995 more\.$": (
            lambda: data.select(classes=["Class 70", "class 1"])
        ),
        r"must be different ones, got 'class 7', 'class 999' more than once$": (
            lambda: data.select(classes=[*names, 7, "class 999"])
        ),
        r"class names must differ, got \{'maillot': 3, 'crane': 2\}$": lambda: data.from_tensors(
            images, [*names[:995], "maillot", "crane", "maillot", "maillot", "crane"], mean=[0.5], std=[0.5]
        ),
    }
    for message, mistake in told.items():
        with pytest.raises((UsageError, FormatError), match=message):
            mistake()


# order, decoding and normalisation


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_samples_are_normalised_views_in_the_order_rank_class_view(factor):
    data = colour(factor)
    views = reference_views(data)
    mean, std = np.reshape(data.mean, (3, 1, 1)), np.reshape(data.std, (3, 1, 1))
    assert len(data) == 2 * 3 * factor**2
    for index, place in enumerate(np.ndindex(2, 3, factor**2)):
        image, _ = data[index]
        assert image.dtype == torch.float32
        np.testing.assert_allclose(image, (views[place] / 255 - mean) / std, atol=2e-6)
        assert data.targets[index] == place[1]


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_images_are_the_decoded_views_rounded_to_bytes(factor):
    data = colour(factor)
    assert data.images.dtype == torch.uint8
    views = reference_views(data).reshape(-1, 3, 6, 12)
    assert np.abs(data.images.numpy() - views).max() <= 0.5 + 1e-4


def test_targets_are_class_numbers_for_every_view(whole):
    assert whole.targets.dtype == torch.int64
    assert whole.targets.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3] * 3


# labels


def test_soft_targets_are_the_softmax_of_the_logits_at_the_stored_temperature(whole, artifact):
    scaled = artifact.logits.double().numpy().reshape(-1, 4) / 2.0
    expected = np.exp(scaled) / np.exp(scaled).sum(1, keepdims=True)
    np.testing.assert_allclose(whole.soft_targets, expected, rtol=1e-5)
    assert whole.soft_targets.dtype == torch.float32


def test_soft_targets_are_one_hot_without_teacher_labels(artifact):
    data = DistilledDataset(dataclasses.replace(artifact, logits=None))
    assert torch.equal(data.soft_targets, torch.eye(4)[data.targets])
    assert data[5][1].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("index", [0, 7, 47])
def test_a_label_is_soft_logits_or_hard_as_asked(folder, artifact, index):
    soft, logits, hard = (
        DistilledDataset.from_folder(folder, labels=labels)[index][1] for labels in ("soft", "logits", "hard")
    )
    stored = artifact.logits.flatten(0, 2)[index]
    assert logits.dtype == soft.dtype == torch.float32
    assert logits.tolist() == stored.tolist()
    assert torch.allclose(soft, (stored.float() / 2).softmax(0))
    assert type(hard) is int
    assert hard == index // 4 % 4


def test_labels_of_another_kind_are_refused(folder, whole):
    with pytest.raises(UsageError, match=r"one of soft, logits, hard, got 'onehot'"):
        DistilledDataset.from_folder(folder, labels="onehot")
    with pytest.raises(UsageError, match=r"one of soft, logits, hard, got None"):
        whole.with_labels(None)


def test_logits_of_an_artifact_without_teacher_are_refused(tmp_path, artifact):
    bare = write(tmp_path, dataclasses.replace(artifact, logits=None))
    with pytest.raises(UsageError, match="no teacher logits"):
        DistilledDataset.from_folder(bare, labels="logits")
    with pytest.raises(UsageError, match="no teacher logits"):
        DistilledDataset.from_folder(bare).with_labels("logits")


# the protocol of torch's datasets


def test_a_batch_is_a_list_of_the_samples_asked_for(whole):
    batch = whole.__getitems__([5, 0, 47, 5])
    assert isinstance(batch, list)
    for index, (image, label) in zip([5, 0, 47, 5], batch, strict=True):
        assert torch.equal(image, whole[index][0])
        assert torch.equal(label, whole[index][1])
    assert whole.__getitems__([]) == []


@pytest.mark.parametrize("index", [-1, -48])
def test_a_negative_index_counts_from_the_end(whole, index):
    assert torch.equal(whole[index][0], whole[48 + index][0])
    assert torch.equal(whole[index][1], whole[48 + index][1])


@pytest.mark.parametrize("index", [48, -49, 10**9])
def test_an_index_outside_is_an_index_error(whole, index):
    with pytest.raises(IndexError, match="48 samples"):
        whole[index]


def test_iterating_gives_every_sample_once_and_ends(whole):
    samples = list(whole)
    assert len(samples) == len(whole) == 48
    assert torch.equal(torch.stack([label for _, label in samples]), whole.soft_targets)


@pytest.mark.parametrize("labels", ["soft", "logits", "hard"])
def test_a_shuffled_data_loader_gives_every_sample_once_with_its_own_label(whole, labels):
    data = whole.with_labels(labels)
    batches = list(DataLoader(data, batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(0)))
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    stored = torch.stack([image for image, _ in data])
    order = [int((stored == image).flatten(1).all(1).nonzero()) for image in images]
    assert sorted(order) == list(range(48))
    assert order != list(range(48))
    expected = [label for _, label in data.__getitems__(order)]
    assert torch.equal(targets, torch.tensor(expected) if labels == "hard" else torch.stack(expected))


def test_a_pickled_set_is_the_same_set(whole):
    whole.target_transform = torch.argmax
    copy = pickle.loads(pickle.dumps(whole))  # its own bytes, as spawned DataLoader workers do
    assert repr(copy) == repr(whole)
    assert copy.content_hash == whole.content_hash
    for index in (0, 20, 47):
        assert torch.equal(copy[index][0], whole[index][0])
        assert copy[index][1] == whole[index][1]
    copy.verify()


def test_reading_samples_changes_nothing(whole):
    image, label = whole[3]
    image.zero_()
    label.zero_()
    assert whole[3][0].abs().sum() > 0
    assert torch.allclose(whole[3][1].sum(), torch.tensor(1.0))


# transforms


def test_a_transform_is_given_a_grey_pil_image(whole):
    from PIL import Image

    whole.transform = lambda image: image
    image, label = whole[9]
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("L", (6, 6))
    assert np.array_equal(np.asarray(image), whole.images[9, 0])
    assert torch.equal(label, whole.soft_targets[9])


def test_a_transform_is_given_a_colour_pil_image_and_what_it_returns_is_the_sample():
    data = colour(2)
    data.transform = lambda image: (image.mode, image.size, np.array(image))
    for index in (0, 23):
        mode, size, pixels = data[index][0]
        assert (mode, size) == ("RGB", (12, 6))
        assert np.array_equal(pixels, data.images[index].permute(1, 2, 0))


def test_a_transform_without_pillow_says_what_to_install(whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    whole.transform = lambda image: image
    with pytest.raises(MissingExtraError, match=r'pip install "distilled-data\[engine\]"'):
        whole[0]


def test_a_target_transform_is_given_the_label(whole):
    hard = whole.with_labels("hard")
    hard.target_transform = lambda label: hard.classes[label]
    assert [label for _, label in hard.__getitems__([0, 4, 47])] == ["ant", "bee", "dog"]
    whole.target_transform = lambda label: label * 2
    assert torch.equal(whole[3][1], whole.soft_targets[3] * 2)


# derived sets


@pytest.mark.parametrize(
    "subset", [{}, {"ipc": 1}, {"classes": ["cat", "ant"]}, {"ipc": 2, "classes": [3, 0, 1]}], ids=str
)
def test_selecting_equals_loading_only_that(folder, whole, subset):
    chosen, loaded = whole.select(**subset), DistilledDataset.from_folder(folder, **subset)
    assert chosen.content_hash == loaded.content_hash
    assert chosen.info == loaded.info
    assert torch.equal(chosen.images, loaded.images)
    assert torch.equal(chosen.soft_targets, loaded.soft_targets)


def test_selecting_leaves_the_set_as_it_was(whole, artifact):
    whole.select(ipc=1, classes=["dog", "cat"])
    assert (len(whole), whole.ipc, whole.classes) == (48, 3, artifact.metadata.classes)
    assert whole.content_hash == artifact.content_hash


def test_derived_sets_keep_labels_transforms_and_folder(whole):
    whole.transform, whole.target_transform = str, repr
    for derived in (whole.select(ipc=1), whole.with_labels("logits").select(classes=[0, 1])):
        assert (derived.transform, derived.target_transform, derived.folder) == (str, repr, whole.folder)
    assert whole.with_labels("hard").select(ipc=2).labels == "hard"


def test_with_labels_changes_the_labels_and_nothing_else(whole):
    hard = whole.with_labels("hard")
    assert (hard.labels, whole.labels) == ("hard", "soft")
    assert hard.content_hash == whole.content_hash
    assert torch.equal(hard[6][0], whole[6][0])


def test_the_content_hash_is_of_the_tensors_that_were_loaded(folder, whole):
    def expected(tensors: dict[str, torch.Tensor]) -> str:
        digest = hashlib.sha256()
        for name, dtype in (("images", "uint8"), ("logits", "float16")):
            digest.update(
                f"{name}:{dtype}:{list(tensors[name].shape)}:".encode() + tensors[name].numpy().tobytes()
            )
        return digest.hexdigest()

    stored = load_file(folder / f.ARTIFACT_FILE)
    assert whole.content_hash == expected(stored)
    part = DistilledDataset.from_folder(folder, ipc=2)
    assert part.content_hash == expected({name: tensor[:2].contiguous() for name, tensor in stored.items()})


def test_repr_says_what_the_set_is(whole):
    class Mine(DistilledDataset):
        pass

    told = "(made up: 48 images of 1x6x6, 4 classes, ipc=3, factor=2, labels='soft')"
    assert repr(whole) == f"DistilledDataset{told}"
    assert repr(Mine(whole.artifact).select()) == f"Mine{told}"
    assert repr(whole.artifact) == "Artifact(made up: images [3, 4, 1, 6, 6], logits [3, 4, 4, 4])"


def test_repr_has_no_characters_that_a_terminal_obeys(whole):
    info = dataclasses.replace(whole.info, dataset="\x1b[2Jdigits")
    renamed = DistilledDataset(dataclasses.replace(whole.artifact, metadata=info))
    assert repr(renamed).startswith(r"DistilledDataset(\x1b[2Jdigits: 48 images")


# sets in memory


def test_a_set_in_memory_has_what_it_was_given():
    data = colour(2)
    assert data.classes == ("red", "green", "blue")
    assert (data.ipc, data.info.factor, len(data)) == (2, 2, 24)
    assert (data.mean, data.std) == ((0.1, 0.5, 0.9), (0.2, 0.3, 0.4))
    assert torch.allclose(data.soft_targets, (data.artifact.logits.float() / 3.0).softmax(3).flatten(0, 2))


def test_mean_and_std_default_to_those_of_the_images():
    images = torch.randint(
        256, (2, 2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    data = DistilledDataset.from_tensors(images, ["a", "b"])
    pixels = images.double().numpy() / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 3, 4)), rtol=1e-12)
    np.testing.assert_allclose(data.std, pixels.std((0, 1, 3, 4), ddof=1), rtol=1e-12)


def test_a_set_in_memory_can_be_saved_and_loaded(tmp_path):
    data = colour(3)
    loaded = DistilledDataset.from_folder(write(tmp_path, data.artifact))
    assert loaded.info == data.info
    assert loaded.content_hash == data.content_hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.full((2, 3, 1, 4, 4), torch.nan)}, "images hold values that are not finite"),
        ({"images": torch.zeros(6, 1, 4, 4, dtype=torch.uint8)}, r"without targets .* got \[6, 1, 4, 4\]"),
        ({"images": torch.zeros(2, 3, 1, 4, 4, dtype=torch.uint8), "std": None}, "std must be positive"),
        ({"images": torch.zeros(2, 3, 2, 4, 4, dtype=torch.uint8)}, "channels must be 1 or 3"),
        ({"classes": ["a", "b"]}, r"\[2, 2, 1, 4, 4\] by the metadata"),
        ({"classes": ["a", "b", "b"]}, "class names must differ"),
        ({"factor": 3}, "multiple of factor 3"),
        ({"factor": 0}, "factor must be a positive integer"),
        ({"mean": [0.5, 0.5]}, "mean must be one number per channel"),
        ({"std": [0.0]}, "std must be positive"),
        ({"logits": torch.zeros(2, 3, 4, 3)}, "artifact tensor 'logits'"),
        ({"logits": torch.full((2, 3, 1, 3), torch.nan)}, "not finite"),
        ({"logits": torch.full((2, 3, 1, 3), 1e6)}, "not finite"),  # beyond half precision
        ({"labels": "logits"}, "no teacher logits"),
        ({"dataset": ""}, "dataset must be a name"),
        ({"source": "mit"}, "source must be an object, got 'mit'"),
    ],
)
def test_tensors_that_make_no_set_are_refused(changes, message):
    good = {
        "images": torch.zeros(2, 3, 1, 4, 4, dtype=torch.uint8),
        "classes": ["a", "b", "c"],
        "mean": [0.5],
        "std": [0.5],
    }
    DistilledDataset.from_tensors(**good)
    with pytest.raises(DistilledDataError, match=message):
        DistilledDataset.from_tensors(**good | changes)


def test_soft_targets_may_have_another_temperature(data):
    cold, warm = (data.with_labels("soft", temperature=t) for t in (0.5, 50.0))
    expected = (data.with_labels("logits")[:][1] / 0.5).softmax(1)
    torch.testing.assert_close(cold.soft_targets, expected)
    assert warm.soft_targets.amax(1).max() < 0.5 < cold.soft_targets.amax(1).max()
    assert (cold.info.labels["temperature"], data.info.labels["temperature"]) == (0.5, 2.0)
    assert cold.content_hash == data.content_hash
    for temperature in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="temperature must be positive"):
            data.with_labels("soft", temperature)


def test_at_another_temperature_only_results_with_hard_labels_are_of_the_set(artifact):
    rows = tuple({"labels": labels} for labels in ("hard", "soft", "teacher"))
    info = dataclasses.replace(artifact.metadata, results=rows)
    data = DistilledDataset(dataclasses.replace(artifact, metadata=info))
    there = info.labels["temperature"]
    found = [data.with_labels("soft", temperature).info.results for temperature in (None, there, there + 1)]
    assert found == [rows, rows, rows[:1]]


def test_a_temperature_without_teacher_logits_is_refused(artifact):
    bare = DistilledDataset(dataclasses.replace(artifact, logits=None))
    with pytest.raises(UsageError, match="no teacher logits"):
        bare.with_labels("soft", temperature=2.0)


def test_tensors_that_lie_at_odd_places_of_a_file_are_read(folder, whole):
    path = folder / "distilled.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    odd = (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :]
    path.write_bytes(odd)
    write_manifest(folder)
    again = DistilledDataset.from_folder(folder)
    assert again.content_hash == whole.content_hash
    assert torch.equal(again.soft_targets, whole.soft_targets)


# verification


def test_an_untouched_folder_verifies_also_through_a_part_of_it(whole):
    whole.verify()
    whole.select(ipc=1).with_labels("hard").verify()


@pytest.mark.parametrize("name", [f.ARTIFACT_FILE, f.PREVIEW_FILE])
def test_an_altered_file_fails_verification(whole, folder, name):
    flip(folder / name)
    with pytest.raises(IntegrityError, match=f"{name} is not the file that was published"):
        whole.verify()


@pytest.mark.parametrize("name", [f.ARTIFACT_FILE, f.PREVIEW_FILE])
def test_a_missing_file_fails_verification(whole, folder, name):
    (folder / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        whole.verify()


def test_a_set_in_memory_has_nothing_to_verify():
    with pytest.raises(UsageError, match="made in memory"):
        colour(1).verify()


def test_loading_needs_the_artifact_and_the_manifest_alone(folder, artifact):
    (folder / f.PREVIEW_FILE).unlink()
    assert DistilledDataset.from_folder(folder).content_hash == artifact.content_hash


def test_a_set_whose_results_are_recorded_while_it_is_loaded_is_loaded_with_them(
    folder, artifact, monkeypatch
):
    measured = dataclasses.replace(artifact.metadata, results=({"ipc": 1},))
    verified = dataset.read_verified

    def late(*arguments, **options):
        monkeypatch.setattr(dataset, "read_verified", verified)
        replace_artifact(folder, dataclasses.replace(artifact, metadata=measured))
        return verified(*arguments, **options)

    monkeypatch.setattr(dataset, "read_verified", late)
    assert DistilledDataset.from_folder(folder).info == measured


def test_a_set_is_loaded_whose_artifact_is_new_already_and_whose_manifest_is_not(
    folder, artifact, monkeypatch
):
    old = (folder / f.MANIFEST_FILE).read_bytes()
    measured = dataclasses.replace(artifact.metadata, results=({"ipc": 1},))
    replace_artifact(folder, dataclasses.replace(artifact, metadata=measured))
    new = (folder / f.MANIFEST_FILE).read_bytes()
    (folder / f.MANIFEST_FILE).write_bytes(old)
    monkeypatch.setattr(manifest.time, "sleep", lambda seconds: (folder / f.MANIFEST_FILE).write_bytes(new))
    assert DistilledDataset.from_folder(folder).info == measured


# folders that cannot be trusted


def test_a_folder_without_a_manifest_is_refused(folder):
    (folder / f.MANIFEST_FILE).unlink()
    with pytest.raises(FormatError, match=r"manifest\.json is missing"):
        DistilledDataset.from_folder(folder)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(FormatError, match="nowhere does not exist; expected the folder of a set"):
        DistilledDataset.from_folder(tmp_path / "nowhere")


def test_a_folder_without_its_artifact_is_refused(folder):
    (folder / f.ARTIFACT_FILE).unlink()
    with pytest.raises(IntegrityError, match=r"distilled\.safetensors is missing"):
        DistilledDataset.from_folder(folder)


def damage(kind: str, content: bytes) -> bytes:
    middle = len(content) - 100
    return {
        "altered": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "truncated": content[:-1],
        "empty": b"",
        "longer": content + b"\0",
    }[kind]


@pytest.mark.parametrize("kind", ["altered", "truncated", "empty", "longer"])
def test_a_damaged_artifact_is_refused_before_it_is_read(folder, monkeypatch, kind):
    path = folder / f.ARTIFACT_FILE
    path.write_bytes(damage(kind, path.read_bytes()))
    monkeypatch.setattr(f, "safe_open", None)
    with pytest.raises(IntegrityError, match="expected sha256"):
        DistilledDataset.from_folder(folder)


@pytest.mark.parametrize("kind", ["truncated", "empty", "longer"])
def test_a_damaged_artifact_is_refused_even_when_the_manifest_was_made_after_the_damage(folder, kind):
    path = folder / f.ARTIFACT_FILE
    content = damage(kind, path.read_bytes())
    path.write_bytes(content)
    manifest = json.loads((folder / f.MANIFEST_FILE).read_text())
    manifest["files"][f.ARTIFACT_FILE] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (folder / f.MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=str(path)):
        DistilledDataset.from_folder(folder)


def test_a_copied_folder_is_the_same_set(folder, tmp_path, whole):
    shutil.copytree(folder, tmp_path / "copy")
    assert DistilledDataset.from_folder(tmp_path / "copy").content_hash == whole.content_hash


# the loader of a set (test_loader.py has the loader itself)


@pytest.mark.parametrize(
    ("recipe", "strategy"),
    [({"augment": "color_crop"}, "color_crop"), ({}, DSA), ({"seed": 1}, DSA)],
    ids=str,
)
def test_dsa_is_the_strategy_that_the_artifact_was_evaluated_with(artifact, recipe, strategy):
    metadata: Metadata = dataclasses.replace(artifact.metadata, recipe=recipe)
    data = DistilledDataset(dataclasses.replace(artifact, metadata=metadata))
    batches, expected = data.loader(16, augment="dsa"), data.loader(16, augment=strategy)
    for (images, _), (others, _) in zip(batches, expected, strict=True):
        assert torch.equal(images, others)


def test_another_strategy_is_taken_as_it_is(artifact):
    metadata = dataclasses.replace(artifact.metadata, recipe={"augment": "color_crop"})
    data = DistilledDataset(dataclasses.replace(artifact, metadata=metadata))
    assert data.loader(augment="flip").augment == "flip"
    assert data.loader().augment is None


def test_the_artifact_file_in_the_place_of_its_folder_is_refused(tmp_path, artifact):
    f.write_artifact(tmp_path / f.ARTIFACT_FILE, artifact)
    write_manifest(tmp_path)
    with pytest.raises(FormatError, match="is a file; expected the folder"):
        DistilledDataset.from_folder(tmp_path / f.ARTIFACT_FILE)


@pytest.mark.parametrize("temperature", [0, -1.0, None, "2", float("nan")])
def test_a_temperature_that_makes_no_probabilities_is_refused(temperature):
    with pytest.raises((UsageError, FormatError)):
        DistilledDataset.from_tensors(
            torch.arange(32, dtype=torch.uint8).view(2, 2, 1, 2, 4),
            ["a", "b"],
            logits=torch.zeros(2, 2, 1, 2),
            temperature=temperature,
        )


@pytest.mark.parametrize("kind", [torch.tensor, lambda values: torch.tensor(values).numpy()])
def test_mean_and_std_may_be_tensors_or_arrays(kind):
    images = torch.arange(32, dtype=torch.uint8).view(2, 2, 1, 2, 4)
    assert DistilledDataset.from_tensors(images, ["a", "b"], mean=kind([0.5]), std=kind([0.25])).mean == (
        0.5,
    )


def test_no_images_are_refused_without_a_warning_from_torch():
    with pytest.raises((UsageError, FormatError)):
        DistilledDataset.from_tensors(torch.zeros(0, 2, 1, 2, 4, dtype=torch.uint8), ["a", "b"])
    with pytest.raises(UsageError, match="images without targets"):
        DistilledDataset.from_tensors(torch.zeros(0, 2, 1, 2, 4), ["a", "b"])
    for images, targets in ((torch.zeros(0, 1, 2, 4), []), (torch.zeros(2, 1, 0, 4), [0, 1])):
        with pytest.raises(UsageError, match="with targets"):
            DistilledDataset.from_tensors(images, targets=targets)
    with pytest.raises(UsageError, match=r"with targets .* and \[2, 0\]"):
        DistilledDataset.from_tensors(torch.zeros(2, 1, 2, 4), targets=torch.zeros(2, 0))


def test_soft_targets_that_are_not_finite_are_refused():
    images, targets = torch.zeros(2, 1, 2, 4, dtype=torch.uint8), torch.tensor([[1.0, 0.0], [0.0, torch.nan]])
    for labels in ({}, {"logits": -torch.eye(2)}):
        for wrong in (targets, targets[1]):
            with pytest.raises(UsageError, match="targets hold values that are not finite"):
                DistilledDataset.from_tensors(images, targets=wrong, **labels)


def test_small_positive_values_beyond_one_are_no_bytes():
    images = torch.linspace(0, 2.5, 16).view(1, 2, 1, 2, 4)
    with pytest.warns(UserWarning, match="taken for 'normalised'"), pytest.raises(UsageError, match="mean"):
        DistilledDataset.from_tensors(images)


@pytest.mark.parametrize("ipc", [1.5, "2"])
def test_an_ipc_that_is_no_whole_number_is_refused(tmp_path, artifact, ipc):
    f.write_artifact(tmp_path / f.ARTIFACT_FILE, artifact)
    write_manifest(tmp_path)
    with pytest.raises(UsageError):
        DistilledDataset.from_folder(tmp_path, ipc=ipc)


def test_a_numpy_class_index_outside_is_refused(artifact):
    for index in (np.int64(-1), np.int64(9), 1.5):
        with pytest.raises(UsageError):
            f.select_classes(artifact, [0, index])


def test_a_pickled_selection_holds_only_what_was_selected():
    images = torch.arange(50 * 4 * 256).to(torch.uint8).view(50, 4, 1, 16, 16)
    data = DistilledDataset.from_tensors(images, list("abcd"))
    assert len(pickle.dumps(data.select(ipc=1))) < len(pickle.dumps(data)) / 5


# Batches, formats and parts


def test_slices_lists_tensors_and_masks_give_stacked_batches(data):
    images, targets = data[1:4]
    assert images.shape == (3, 1, 6, 6)
    assert torch.equal(targets, data.soft_targets[1:4])
    mask = torch.zeros(len(data), dtype=torch.bool)
    mask[1:4] = True
    for index in ([1, 2, 3], torch.tensor([1, 2, 3]), mask, np.array([1, 2, 3]), (1, 2, -len(data) + 3)):
        assert torch.equal(data[index][0], images)
    assert data[[]][0].numel() == data[5:5][0].numel() == 0
    assert torch.equal(data.with_labels("hard")[1:4][1], data.targets[1:4])


@pytest.mark.parametrize(
    "index",
    [
        *(1.5, "1", [1.5], [[1]], [[1], [1, 2]], [999], None),
        *(torch.ones(3, dtype=torch.bool), torch.tensor([[1]]), torch.ones(48, 1, dtype=torch.bool)),
        *(torch.tensor([1.0]).bfloat16(), torch.ones(2, requires_grad=True)),
        torch.ones(2, dtype=torch.int64, device="meta"),
    ],
)
def test_an_index_that_names_no_samples_is_refused(data, index):
    with pytest.raises(IndexError):
        data[index]


class Column:
    """As a column of pandas is: neither a sequence nor a tensor, but an array to numpy."""

    ndim = 1

    def __array__(self, dtype=None, copy=None):
        return np.array([3, 1], dtype)


def test_a_column_of_a_table_is_an_index(data):
    assert torch.equal(data[Column()][0], data[[3, 1]][0])


def test_a_batch_sampler_may_give_tensors_and_arrays(data):
    for batch in (torch.tensor([3, -1]), np.array([3, -1]), [torch.tensor(3), np.int64(-1)]):
        images, _ = next(iter(DataLoader(data, batch_sampler=[batch])))
        assert torch.equal(images, data[[3, 47]][0])


@pytest.mark.parametrize("index", [1.5, True, torch.tensor(False), 48, -49])
def test_a_sampler_that_names_no_sample_is_refused(data, index):
    for batches in (DataLoader(data, 2, sampler=[index, index]), DataLoader(Subset(data, [index]), 1)):
        with pytest.raises(IndexError, match=r"expected whole numbers|is outside the 48 samples"):
            list(batches)


def test_a_mask_in_the_place_of_the_rows_of_a_subset_is_refused_in_batches_of_any_size(data):
    part = Subset(data, torch.arange(len(data)) < 3)
    for size in (5, len(data)):
        with pytest.raises(IndexError, match=r"expected whole numbers, got \[tensor\(True"):
            list(DataLoader(part, size))


def test_samples_as_dicts_have_the_keys_asked_for_and_keep_them_in_parts(data):
    data = data.with_format("dict", label_key="soft")
    assert list(data[0]) == list(data[0:2]) == list(data.select(ipc=1)[0]) == ["pixel_values", "soft"]
    assert torch.equal(data[0:2]["soft"], data.soft_targets[:2])
    assert isinstance(data.with_format("tuple")[0], tuple)
    with pytest.raises(UsageError):
        data.with_format("numpy")
    with pytest.raises(UsageError):
        data.with_format("dict", "x", "x")


def test_a_batch_of_transformed_samples_is_a_list_where_it_cannot_be_stacked(data):
    data.transform = lambda image: image
    images, targets = data[0:2]
    assert [image.size for image in images] == [(6, 6)] * 2
    assert targets.shape == (2, 4)
    lengths = iter((4, 5))
    data.transform = lambda image: torch.zeros(next(lengths))
    data.target_transform = lambda target: int(target.argmax())
    images, targets = data[0:2]
    assert [len(image) for image in images] == [4, 5]
    assert torch.equal(targets, data.soft_targets[:2].argmax(1))


def test_the_data_of_torchvision_is_height_width_channels(data):
    assert data.data.shape == (len(data), 6, 6, 1)
    assert np.array_equal(data.data[7, :, :, 0], data.images[7, 0].numpy())


def test_a_split_parts_the_packed_images_of_every_class_and_loses_none(data):
    one, two = data.split(0.34, seed=3)
    assert (one.ipc, two.ipc) == (1, 2)
    for label in range(4):
        both = torch.cat([one.artifact.images[:, label], two.artifact.images[:, label]]).flatten(1)
        whole = data.artifact.images[:, label].flatten(1)
        assert sorted(both.tolist()) == sorted(whole.tolist())
    assert torch.equal(one.artifact.images, data.split(0.34, seed=3)[0].artifact.images)
    assert any(not torch.equal(one.artifact.images, data.split(0.34, s)[0].artifact.images) for s in range(9))
    taken = set()
    for part in (one, two):
        for place in np.ndindex(part.ipc, 4):
            same = (data.artifact.images[:, place[1]] == part.artifact.images[place]).flatten(1).all(1)
            rank = same.nonzero().item()
            assert torch.equal(part.artifact.logits[place], data.artifact.logits[rank, place[1]])
            taken |= {rank} if part is one else set()
    assert len(taken) > 1  # each class has a draw of its own


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 0.1, 0.9, float("nan")])
def test_a_split_that_leaves_a_part_empty_is_refused(data, fraction):
    with pytest.raises(UsageError, match="leaves one part empty"):
        data.split(fraction)


def test_an_empty_selection_is_a_batch_of_no_samples(whole):
    for labels, dtype, shape in (("soft", torch.float32, (0, 4)), ("hard", torch.int64, (0,))):
        images, targets = whole.with_labels(labels)[[]]
        assert (images.shape, images.dtype) == ((0, 1, 6, 6), torch.float32)
        assert (targets.shape, targets.dtype) == (shape, dtype)


def test_a_mask_of_another_length_is_told_by_it(whole):
    with pytest.raises(IndexError, match=f"a mask of {len(whole)}, got a mask of 7"):
        whole[torch.ones(7, dtype=torch.bool)]


def test_numbers_may_be_those_of_numpy(whole):
    loader = whole.loader(np.int64(5), seed=np.int64(3), rank=np.int32(1), world_size=np.int32(2))
    loader.set_epoch(np.int64(2))
    json.dumps(loader.state_dict())
    assert whole.select(np.int64(2)).ipc == 2
    assert torch.equal(whole[np.array([3, 1], np.uint8)][0], whole[[3, 1]][0])
    warmer = whole.with_labels("soft", np.float32(4))
    json.dumps(warmer.info.labels)
    packed = DistilledDataset.from_tensors(whole.artifact.images, factor=np.int64(2))
    assert torch.equal(packed.images, whole.images)
    packed.info.to_json()
    assert torch.equal(warmer.soft_targets, whole.with_labels("soft", 4).soft_targets)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: data.loader(rank="0", world_size=2), "rank must be a whole number, 0 or more, got '0'"),
        (lambda data: DistilledDataset("distilled/set"), "got 'distilled/set'; DistilledDataset.from_f"),
        (lambda data: DistilledDataset(data.images), "(?s)got tensor.{74}; DistilledDataset.from_f"),
        (lambda data: DistilledDataset.from_hub(None), "None is not a repository name"),
        (lambda data: data.dataloader(8, sampler=[1]), r"takes no sampler; .*DataLoader\(data, sampler="),
        (lambda data: data.dataloader(8, batch_sampler=[[1]]), "takes no batch_sampler"),
        (lambda data: data.dataloader(8, collate_fn=list), "takes no collate_fn"),
        (lambda data: data.loader(world_size=0), "world_size must be a whole number, 1 or more, got 0"),
        (lambda data: data.loader(world_size=2.0), "world_size must be a whole number"),
        (lambda data: data.loader(8).set_epoch(-1), "epoch must be a whole number, 0 or more"),
        (lambda data: data.loader(8).load_state_dict(None), "state is of another loader"),
        (lambda data: data.loader(8, device="cud"), "device 'cud' cannot be used: "),
        (
            lambda data: DistilledDataset.from_tensors(data.artifact.images, "abcd"),
            "classes must be several names, in an order, got 'abcd'",
        ),
        (
            lambda data: DistilledDataset.from_tensors(data.artifact.images, {"a", "b", "c", "d"}),
            "classes must be several names, in an order, got {'",
        ),
        (
            lambda data: DistilledDataset.from_tensors(data.artifact.images, 4),
            "several names, in an order, got 4",
        ),
        (
            lambda data: DistilledDataset.from_tensors(data.images, targets=data.targets, logits=2.0),
            r"expected logits for each of 48 images, got \[\]",
        ),
        (
            lambda data: data.with_format("dict", image_key=["x"]),
            r"two names that differ, got \['x'\] and 'la",
        ),
        (lambda data: data.with_format("dict", "x", "x"), "two names that differ, got 'x' and 'x'"),
        (lambda data: data.loader(mix=torch.nn.Module), "mix must be None, a strategy's .* <class 'torch.nn"),
        (lambda data: data.loader(augment=torch.nn.Module), "augment must be None, .* <class 'torch.nn"),
        (lambda data: resumed_at(data.loader(8), 99), "the state's batch must be 0 to 5, got 99"),
        (lambda data: resumed_at(data.loader(8), -1), "the state's batch must be a whole number"),
        (lambda data: data.select(classes=3), "classes must be several names or indices, in an order, got 3"),
        (lambda data: data.select(classes={"one", "two"}), "several names or indices, in an order, got {'"),
        (lambda data: data.select(classes=[True, False]), "class index True is not a whole number"),
        (lambda data: data.select(classes=[np.True_, np.False_]), "class index True is not a whole number"),
        (lambda data: data.with_labels("soft", "2x"), "must be positive, 1e-30 to 1e30, got '2x'"),
        (lambda data: data.split("0.5"), "fraction must be a number between 0 and 1, got '0.5'"),
        (lambda data: data.split(0.5, seed=None), "seed must be a whole number, got None"),
        (lambda data: data.select(classes=torch.tensor([[3, 1], [2, 3]])), r"class index \[3, 1\] is not"),
        (lambda data: data.select(classes=np.array(3)), "several names or indices, in an order, got 3"),
        (lambda data: data.with_labels("soft", 1e-39), "must be positive, 1e-30 to 1e30, got 1e-39"),
        (lambda data: data.with_labels("soft", 1e31), r"must be positive, 1e-30 to 1e30, got 1e\+31"),
    ],
)
def test_a_wrong_argument_is_named(whole, call, message):
    with pytest.raises(UsageError, match=message):
        call(whole)


def test_an_augmentation_may_make_colours_of_grey_and_with_a_teacher_more_images(whole):
    images, _ = next(iter(whole.loader(8, augment=lambda x: x.expand(-1, 3, -1, -1).clone())))
    assert images.shape == (8, 3, 6, 6)
    twice = whole.loader(8, augment=lambda x: torch.cat([x, x]), teacher=lambda x: torch.zeros(len(x), 4))
    assert [len(part) for part in next(iter(twice))] == [16, 16]


@pytest.mark.parametrize("mix", ["cutmix", "mixup", lambda images, targets: (images, targets)])
def test_more_images_than_targets_are_mixed_too_where_a_teacher_labels_them(whole, mix):
    options = {"teacher": lambda x: x.flatten(1)[:, :4], "mix": mix}
    images, targets = next(iter(whole.loader(8, augment=lambda x: torch.cat([x, x]), **options)))
    assert torch.equal(targets, soften(images.flatten(1)[:, :4], whole.info.labels["temperature"]))


@pytest.mark.parametrize(
    "mix", [lambda x, y: None, lambda x, y: x, lambda x, y: (x, y, y), lambda x, y: (None, y)]
)
def test_a_mixing_that_gives_no_images_and_targets_is_named_beside_a_teacher_too(whole, mix):
    for teacher in (None, lambda x: torch.zeros(len(x), 4)):
        with pytest.raises(UsageError, match="mix must return images and as many targets, got"):
            next(iter(whole.loader(8, mix=mix, teacher=teacher)))


def test_an_augmentation_that_loses_channels_is_named():
    coloured = DistilledDataset(make_artifact(channels=3))
    with pytest.raises(UsageError, match=r"floats \[8, 3, height, width\], got torch.float32 \[8, 1, 8, 8\]"):
        next(iter(coloured.loader(8, augment=lambda x: x[:, :1])))


def test_labels_of_a_teacher_in_inference_mode_can_be_learned_from(whole):
    infer = torch.inference_mode()(lambda x: x.flatten(1)[:, :4] * 1.0)
    student = torch.nn.Linear(36, 4)
    for labels in ("logits", "soft"):
        images, targets = next(iter(whole.with_labels(labels).loader(8, teacher=infer)))
        torch.nn.functional.mse_loss(student(images.flatten(1)), targets).backward()


def test_a_batch_size_of_numpy_is_a_number(whole):
    sizes = [len(images) for images, _ in whole.dataloader(np.int64(20))]
    assert sizes == [20, 20, 8]


@pytest.mark.parametrize("yes", [1, np.True_])
def test_dropping_the_last_batch_may_be_any_word_for_it(whole, yes):
    for make in (whole.loader, whole.dataloader):
        assert [len(images) for images, _ in make(20, drop_last=yes)] == [20, 20]


def test_a_sampler_goes_on_at_a_position_that_is_there(whole):
    state = (sampler := iter(whole.dataloader(8).sampler)).state_dict()
    for position in (-1, 49, "x"):
        with pytest.raises(UsageError, match="the state's position must be"):
            sampler.load_state_dict(state | {"position": position})


def resumed_at(loader, batch):
    loader.load_state_dict(loader.state_dict() | {"batch": batch})


def test_classes_may_come_from_a_generator(whole):
    assert whole.select(classes=(name for name in ("dog", "ant"))).classes == ("dog", "ant")


@pytest.mark.parametrize("kind", [lambda values: values, lambda values: values.numpy()])
def test_a_set_in_memory_does_not_change_with_what_it_was_made_of(kind):
    images, logits = torch.full((1, 2, 1, 4, 4), 7, dtype=torch.uint8), torch.ones(1, 2, 1, 2).half()
    data = DistilledDataset.from_tensors(kind(images), logits=kind(logits), mean=[0.5], std=[0.2])
    before = data.content_hash
    images.zero_()
    logits.zero_()
    assert data.content_hash == before


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[..., ::-1],
        lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
        lambda a: a.astype(">f4"),
    ],
)
def test_arrays_of_any_layout_are_taken(change):
    array = np.arange(2 * 2 * 16, dtype=np.float32).reshape(2, 2, 1, 4, 4)
    data = DistilledDataset.from_tensors(change(array), values="bytes")
    assert np.array_equal(data.artifact.images.numpy(), change(array).astype(np.uint8))


@pytest.mark.parametrize("name", ["images", "targets", "logits"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.Tensor.to_sparse, "torch.float32, torch.sparse_coo"),
        (lambda values: values.to("meta"), "torch.float32, meta"),
        (lambda values: torch.quantize_per_tensor(values, 1.0, 0, torch.quint8), "torch.quint8"),
        (lambda values: values + 1j, "torch.complex64"),
        (lambda values: values.numpy() + 1j, "torch.complex64"),
        (lambda values: values.to(torch.float8_e5m2), "torch.float8_e5m2"),
        (lambda values: torch.nested.nested_tensor([values[0].view(-1)] * 2), "torch.float32, nested"),
    ],
)
@pytest.mark.filterwarnings("ignore:(torch.quantize_per_tensor|The PyTorch API of nested):UserWarning")
def test_numbers_that_are_not_real_or_not_all_there_are_refused(name, change, message):
    given = {"images": torch.ones(2, 1, 4, 4), "targets": torch.arange(2.0), "logits": 3 * torch.eye(2)}
    with pytest.raises(UsageError, match=f"{name} must be a dense tensor of .* got one of {message}"):
        DistilledDataset.from_tensors(**given | {name: change(given[name])}, values="unit")


@pytest.mark.filterwarnings("ignore:targets are positive:UserWarning")
@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_numbers_are_as_good_as_others(dtype):
    images, logits = torch.arange(32).view(2, 1, 4, 4), torch.tensor([[1, 5], [7, 0]])
    targets = torch.tensor([[0, 3], [4, 1]])
    for labels in ({"targets": targets}, {"targets": targets.argmax(1), "logits": logits}):
        expected = DistilledDataset.from_tensors(images, **labels, values="bytes")
        unsigned = {name: values.to(dtype) for name, values in labels.items()}
        data = DistilledDataset.from_tensors(images.to(dtype), **unsigned, values="bytes")
        assert data.content_hash == expected.content_hash


def test_artifacts_are_compared_by_their_hashes(artifact):
    assert artifact != dataclasses.replace(artifact)
    assert artifact in {artifact}


def test_a_subclass_says_what_a_sample_is(data):
    class Numbered(DistilledDataset):
        def __getitem__(self, index):
            return (*super().__getitem__(index), index)

    numbered = Numbered(data.artifact)
    for part, expected in ((numbered, [0, 1, 2, 3]), (Subset(numbered, [5, 0, 7, 2]), [5, 0, 7, 2])):
        images, targets, rows = next(iter(DataLoader(part, 4)))
        assert rows.tolist() == expected
        assert torch.equal(images, data[expected][0])
        assert torch.equal(targets, data[expected][1])
