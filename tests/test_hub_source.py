"""Data sets of the Hugging Face Hub as a source, from a folder and over HTTP."""

import json
import os
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ROOT
from huggingface_hub import HfApi
from photographs import CLASSES, by_pixels, encoded, photographs, pixels_of, write_folder
from PIL import Image

from distilled_data.errors import SourceError, UsageError
from ncfm_engine.sources import hub, load_source
from ncfm_engine.sources.reader import Damage, Record

IMAGES, LABELS = photographs(6)
EXPECTED = by_pixels(IMAGES, LABELS)


def write(folder, columns=None, files: int = 2, **splits: slice):
    """A folder of parquet files, with a column of images and others."""
    for split, rows in (splits or {"train": slice(None)}).items():
        content = {"image": [Image.fromarray(image) for image in IMAGES[rows]]}
        features = {"image": datasets.Image()}
        for name, (values, kind) in (
            columns or {"label": (LABELS, datasets.ClassLabel(names=list(CLASSES)))}
        ).items():
            content[name], features[name] = list(values[rows]), kind
        data = datasets.Dataset.from_dict(content, features=datasets.Features(features))
        for number in range(files):
            path = folder / "data" / f"{split}-{number:05d}-of-{files:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            # which is told the batch size: datasets 4.6 to 5.0 find none for no rows
            data.shard(files, number).to_parquet(str(path), batch_size=100)
    return folder


@pytest.fixture
def sized(monkeypatch):
    """A folder of parquet files does not tell its size; here it does."""
    builder = datasets.load_dataset_builder

    def told(*arguments):
        found = builder(*arguments)
        found.info.dataset_size = 1000
        return found

    monkeypatch.setattr(datasets, "load_dataset_builder", told)


@pytest.mark.parametrize("threshold", [0, 2**40])
def test_images_and_labels_are_found_streamed_and_not(tmp_path, monkeypatch, sized, threshold):
    folder = write(tmp_path / "flowers")
    monkeypatch.setattr(hub, "STREAMED_FROM", threshold)
    monkeypatch.setattr(hub, "ROWS", 10)
    monkeypatch.setattr(hub, "BATCH", 3)
    told = {"license": "cc0-1.0", "citation": "@misc{flowers}"}  # as old data sets tell it
    (folder / "dataset_infos.json").write_text(json.dumps({"default": told}))
    source = load_source(f"hf:{folder}")
    assert pixels_of(source) == EXPECTED
    assert source.classes == CLASSES
    assert (source.origin.license, source.origin.citation) == tuple(told.values())
    assert (source.name, source.origin.id) == ("flowers", "hf:flowers")


def test_a_folder_below_the_home_is_found_and_is_the_same_by_its_whole_name(tmp_path, monkeypatch):
    folder = write(tmp_path / "flowers")
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in ("hf:~/flowers", f"hf:{folder}"):
        source = load_source(spec)
        assert (pixels_of(source), source.origin.id) == (EXPECTED, "hf:flowers")
    assert len(list((tmp_path / "cache" / "distilled-data" / "stores").iterdir())) == 1


@pytest.mark.parametrize("name", ["test", "validation"])
def test_a_split_for_testing_is_found_by_its_name(tmp_path, name):
    folder = write(tmp_path / "flowers", **{"train": slice(16), name: slice(16, None)})
    source = load_source(f"hf:{folder}")
    assert (len(source.train), len(source.test)) == (16, 8)


@pytest.mark.parametrize("name", ["test", "validation", "train", "all"])
def test_the_images_of_an_only_split_are_not_tested_on_as_well(tmp_path, name):
    source = load_source(f"hf:{write(tmp_path / 'flowers', **{name: slice(None)})}")
    train, test = ({image.numpy().tobytes() for image in part.images} for part in (source.train, source.test))
    assert not train & test
    assert len(train | test) == len(IMAGES)


def test_one_of_several_configurations_is_chosen_in_the_name(tmp_path):
    folder = write(tmp_path / "flowers", one=slice(8), two=slice(8, None))
    configurations = [{"config_name": name, "data_files": f"data/{name}-*"} for name in ("one", "two")]
    card = {"configs": configurations, "license": ["mit"]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    source = load_source(f"hf:{folder}:two")
    assert (source.origin.id, source.origin.license) == ("hf:flowers:two", "mit")
    assert pixels_of(source) == by_pixels(IMAGES[8:], LABELS[8:])


@pytest.mark.parametrize(
    ("said", "license"),
    [(["mit", "cc0-1.0"], "other"), ([], "unknown"), (None, "unknown"), ("mit", "mit"), (0.1, "0.1")],
)
def test_the_licence_is_the_one_that_the_card_names(tmp_path, said, license):
    folder = write(tmp_path / "flowers")
    (folder / "README.md").write_text(f"---\n{json.dumps({'license': said})}\n---\n")
    assert hub.HubReader(str(folder)).origin.license == license


def test_of_several_splits_without_the_usual_name_one_has_to_be_chosen(tmp_path):
    folder = write(tmp_path / "flowers", first=slice(16), second=slice(16, None))
    with pytest.raises(SourceError, match=r"hf:.* cannot be loaded: .*train"):
        load_source(f"hf:{folder}")
    assert len(load_source(f"hf:{folder}::first,second").test) == 8


def test_a_split_without_rows_is_named(tmp_path, sized):
    folder = write(tmp_path / "flowers", files=1, train=slice(8), test=slice(0))
    with pytest.raises(SourceError, match=r'flowers cannot be loaded: ValueError: .*"test"'):
        load_source(f"hf:{folder}")


def test_files_that_changed_are_read_again(tmp_path):
    folder = write(tmp_path / "flowers", train=slice(16), test=slice(16, None))
    first = load_source(f"hf:{folder}")
    write(folder, train=slice(8), test=slice(16, None))
    second = load_source(f"hf:{folder}")
    assert (len(first.train), len(second.train)) == (16, 8)


def test_splits_are_chosen_in_the_name(tmp_path):
    folder = write(tmp_path / "flowers", train=slice(8), test=slice(8, 16), extra=slice(16, None))
    source = load_source(f"hf:{folder}:default:train,extra")
    assert (source.origin.id, len(source.train), len(source.test)) == ("hf:flowers:default", 8, 8)
    rows = [*range(8), *range(16, len(IMAGES))]
    assert pixels_of(source) == by_pixels(IMAGES[rows], LABELS[rows])
    assert len(load_source(f"hf:{folder}::train,test[:50%]").test) == 4
    part = load_source(f"hf:{folder}::test[:100%]")
    assert len(part.train) + len(part.test) == 8


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("org/flowers", ["org/flowers", "", ""]),
        ("org/flowers::test[:50%],test[50%:]", ["org/flowers", "", "test[:50%],test[50%:]"]),
        (r"C:\data\flowers", [r"C:\data\flowers", "", ""]),
        ("C:/data/flowers:small:train", ["C:/data/flowers", "small", "train"]),
    ],
)
def test_the_colon_of_a_drive_is_not_one_before_a_configuration(spec, parts):
    assert hub.divided(spec) == parts


def test_one_of_several_label_columns_is_chosen_by_name(tmp_path):
    kind = datasets.ClassLabel
    columns = {"fine": (LABELS, kind(names=list(CLASSES))), "coarse": (LABELS // 2, kind(names=["a", "b"]))}
    folder = write(tmp_path / "flowers", columns)
    with pytest.raises(UsageError, match=r"fine \(ClassLabel\), coarse \(ClassLabel\).*--label-column NAME"):
        load_source(f"hf:{folder}")
    assert load_source(f"hf:{folder}", label_column="coarse").classes == ("a", "b")
    assert load_source(f"hf:{folder}", label_column="fine").classes == CLASSES
    with pytest.raises(UsageError, match="no column 'finer'; it has image, fine, coarse"):
        load_source(f"hf:{folder}", label_column="finer")


def test_of_several_columns_of_images_the_one_called_image_is_read(tmp_path):
    masks = [Image.fromarray(255 - image) for image in IMAGES]
    label = (LABELS, datasets.ClassLabel(names=list(CLASSES)))
    folder = write(tmp_path / "flowers", {"a_mask": (masks, datasets.Image()), "label": label})
    assert pixels_of(load_source(f"hf:{folder}")) == EXPECTED


def test_the_fine_labels_of_cifar100_are_preferred(tmp_path):
    kind = datasets.ClassLabel
    columns = {
        "fine_label": (LABELS, kind(names=list(CLASSES))),
        "coarse_label": (LABELS // 2, kind(names=["a", "b"])),
    }
    assert load_source(f"hf:{write(tmp_path / 'flowers', columns)}").classes == CLASSES


@pytest.mark.parametrize(
    ("values", "kind", "classes"),
    [
        (LABELS, "int64", tuple("0123")),
        (np.array(CLASSES)[LABELS], "string", CLASSES),
        (np.array(CLASSES)[LABELS], "large_string", CLASSES),
    ],
)
def test_labels_may_be_plain_numbers_or_names(tmp_path, values, kind, classes):
    source = load_source(
        f"hf:{write(tmp_path / 'flowers', {'label': (values.tolist(), datasets.Value(kind))})}"
    )
    assert source.classes == classes
    assert pixels_of(source) == EXPECTED


def test_labels_of_another_type_are_told_as_what_they_are(tmp_path):
    folder = write(tmp_path / "flowers", {"label": ((LABELS > 1).tolist(), datasets.Value("bool"))})
    with pytest.raises(SourceError, match="the label False is neither a number nor a name"):
        load_source(f"hf:{folder}", label_column="label")


def test_a_file_whose_columns_have_no_known_types_is_refused_in_words(tmp_path, monkeypatch):
    folder = tmp_path / "table"
    folder.mkdir()
    (folder / "train.csv").write_text("image,label\n1.png,0\n")
    monkeypatch.setattr(hub, "STREAMED_FROM", 0)
    with pytest.raises(UsageError, match="expected one of type Image"):
        load_source(f"hf:{folder}")


def test_a_row_without_label_or_image_and_a_damaged_image_are_named(tmp_path):
    names = datasets.ClassLabel(names=list(CLASSES))
    cells = [{"bytes": encoded(image), "path": None} for image in IMAGES]
    cells[3], cells[7] = None, {"bytes": encoded(IMAGES[7])[:-50], "path": None}
    labels = [None if row == 5 else -1 if row == 6 else int(label) for row, label in enumerate(LABELS)]
    features = datasets.Features({"image": datasets.Image(), "label": names})
    (tmp_path / "flowers").mkdir()
    data = datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)
    data.to_parquet(str(tmp_path / "flowers" / "train.parquet"))
    with pytest.raises(SourceError, match="4 of 24 images cannot be used") as caught:
        load_source(f"hf:{tmp_path / 'flowers'}")
    text = str(caught.value)
    assert all(
        part in text
        for part in ("row 3 (no image)", "row 5 (no label)", "row 6 (label -1 is not in 0 to 3)", "row 7 (")
    )
    with pytest.warns(UserWarning, match="left out 4 of 24"):
        source = load_source(f"hf:{tmp_path / 'flowers'}", skip_damaged=True)
    assert len(source.train) + len(source.test) == 20


def test_a_row_that_names_a_file_is_read_only_within_the_data_set(tmp_path, monkeypatch):
    folder = tmp_path / "flowers"
    folder.mkdir()
    for place in (folder / "own.png", tmp_path / "secret.png"):
        place.write_bytes(encoded(IMAGES[0]))
    archive = f"{shutil.make_archive(str(folder / 'all'), 'zip', folder, 'own.png')}"
    own = [f"{folder}/own.png", f"zip://own.png::{archive}"]
    secret = [
        f"{tmp_path}/secret.png",
        f"{folder}/../secret.png",
        "secret.png",
        f"file://{tmp_path}/secret.png",
    ]
    secret += [f"file://{tmp_path}/secret.png::{folder}/own.png", f"{folder}/x::file://{tmp_path}/secret.png"]
    gone = [f"{folder}/gone.png", f"{folder}/"]
    cells = [{"bytes": None, "path": path} for path in (*own, *secret, *gone)]
    cells += [{"bytes": b"", "path": None}, {"bytes": b"", "path": "own.png"}, {"bytes": None, "path": None}]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": ["x"] * len(cells), "label": [0] * len(cells)}, features)
    schema = data.data.schema
    images = pa.array(cells, schema.field("image").type)
    table = pa.table([images, data.data["label"]], schema.with_metadata(features.arrow_schema.metadata))
    pq.write_table(table, folder / "train.parquet")
    monkeypatch.chdir(tmp_path)
    reader = hub.HubReader(str(folder))
    found = [record for unit in reader.units for record in reader.read(unit)]
    assert [record.image for record in found if isinstance(record, Record)] == [encoded(IMAGES[0])] * 2 + [
        b""
    ] * 2
    reasons = [record.reason for record in found if isinstance(record, Damage)]
    assert reasons == [
        *(f"instead of an image the path {path!r:.200}, which is not in the data set" for path in secret),
        *(f"no file {path}" for path in gone),
        "no image",
    ]


def test_a_test_split_without_rows_is_not_replaced_by_a_part_of_train(tmp_path, sized):
    folder = write(tmp_path / "flowers", files=1, train=slice(None), test=slice(0))
    with pytest.raises(SourceError, match=r"no rows|no data"):
        load_source(f"hf:{folder}")


def test_a_file_that_breaks_off_is_an_error_and_no_end(tmp_path):
    folder = write(tmp_path / "flowers")
    reader = hub.HubReader(str(folder))
    for path in (folder / "data").glob("*-00001-of-*"):
        path.write_bytes(path.read_bytes()[:-9])
    first, second = reader.units
    assert len(list(reader.read(first))) == len(IMAGES) // 2
    with pytest.raises(SourceError, match="hf:flowers: reading stopped after train file 1, row 0: "):
        list(reader.read(second))


def test_files_in_class_folders_are_read_as_datasets_reads_them(tmp_path, monkeypatch):
    write_folder(tmp_path / "flowers", IMAGES, LABELS)
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "flowers", "flowers"):
        source = load_source(f"hf:{place}")
        assert source.origin.license == "unknown"
        assert (source.name, source.classes, pixels_of(source)) == ("flowers", CLASSES, EXPECTED)


def test_a_card_may_name_an_archive_that_lies_elsewhere(tmp_path):
    (tmp_path / "images").mkdir()
    table = ["file_name,label"]
    for row, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        (tmp_path / "images" / f"{row}.png").write_bytes(encoded(image))
        table.append(f"{row}.png,{label}")
    (tmp_path / "images" / "metadata.csv").write_text("\n".join(table))
    archive = shutil.make_archive(str(tmp_path / "elsewhere"), "zip", tmp_path / "images")
    configurations = [{"config_name": "default", "data_files": archive}]
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers" / "README.md").write_text(f"---\n{json.dumps({'configs': configurations})}\n---\n")
    assert pixels_of(load_source(f"hf:{tmp_path / 'flowers'}")) == EXPECTED


def test_what_is_not_there_or_has_no_images_is_refused(tmp_path):
    with pytest.raises(SourceError, match="hf:org/nothing cannot be loaded"):
        load_source("hf:org/nothing")
    with pytest.raises(UsageError, match="is not hf:REPO"):
        load_source("hf::config")
    folder = tmp_path / "flowers"
    folder.mkdir()
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}).to_parquet(str(folder / "train.parquet"))
    with pytest.raises(UsageError, match=r"text \(Value\), label \(Value\); expected one of type Image"):
        load_source(f"hf:{folder}")


def publish(folder, loopback) -> str:
    """The commit of a folder that is made the repository org/flowers."""
    api = HfApi(loopback.url, "hf_alice")
    api.create_repo("org/flowers", repo_type="dataset")
    api.upload_folder(repo_id="org/flowers", folder_path=folder, repo_type="dataset")
    return loopback.head("org/flowers").oid


# Each reading is by a process of its own, which has yet to import what looks at the environment.
READER = """
import json, os, sys
import pandas, pyarrow.parquet
from ncfm_engine.sources import load_source

assert "huggingface_hub" not in sys.modules
for line in sys.stdin:
    if not os.fork():
        os.environ.update(json.loads(line))
        source = load_source("hf:org/flowers")
        origin = source.origin
        found = [origin.id, origin.revision, origin.license, source.fingerprint, len(source.test)]
        print(json.dumps(found), flush=True)
        sys.exit()
    if os.wait()[1]:
        print("null", flush=True)
"""


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """What a new process finds that reads org/flowers with these variables of the environment."""
    errors = tmp_path_factory.mktemp("reader") / "errors"
    variables = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "", "OMP_NUM_THREADS": "1"}
    words = {"args": [sys.executable, "-c", READER], "env": variables, "text": True}

    def read(**settings: str) -> list:
        process.stdin.write(json.dumps(settings) + "\n")
        process.stdin.flush()
        found = json.loads(process.stdout.readline() or "null")
        assert found, errors.read_text()
        return found

    with (
        errors.open("w") as file,
        subprocess.Popen(**words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file) as process,
    ):
        yield read


@pytest.fixture
def read_in_a_process(reader, tmp_path, loopback):
    """Id, revision, licence, fingerprint and number of test images of org/flowers."""

    def read(offline: str = "0") -> list:
        return reader(
            HF_ENDPOINT=loopback.url,
            HF_HOME=str(tmp_path / "home"),
            HF_DATASETS_OFFLINE=offline,
            HF_HUB_OFFLINE=offline,
            XDG_CACHE_HOME=str(tmp_path / "cache"),
        )

    return read


def test_a_repository_is_read_over_http_and_its_commit_is_recorded(tmp_path, loopback, read_in_a_process):
    folder = write(tmp_path / "flowers", train=slice(16), test=slice(16, None))
    commit = publish(folder, loopback)
    expected = ["hf:org/flowers", commit, "unknown", load_source(f"hf:{folder}").fingerprint, 8]
    assert read_in_a_process() == expected


def test_a_repository_that_tells_its_small_size_is_kept_and_read_offline_at_the_same_commit(
    tmp_path, loopback, read_in_a_process
):
    folder = write(tmp_path / "flowers", train=slice(16), test=slice(16, None))
    splits = [{"name": "train", "num_examples": 16}, {"name": "test", "num_examples": 8}]
    info = {"splits": splits, "download_size": 9000, "dataset_size": 9000}
    card = json.dumps({"dataset_info": info, "license": "cc-by-4.0"})
    (folder / "README.md").write_text(f"---\n{card}\n---\n")  # JSON is YAML
    commit = publish(folder, loopback)
    first = read_in_a_process()
    asked = len(loopback.requests)
    assert first[1:3] == [commit, "cc-by-4.0"]
    assert read_in_a_process(offline="1") == first
    assert len(loopback.requests) == asked


def test_class_folders_of_a_repository_are_streamed_undecoded(tmp_path, loopback, read_in_a_process):
    write_folder(tmp_path / "flowers", IMAGES, LABELS)
    publish(tmp_path / "flowers", loopback)
    here = load_source(f"hf:{tmp_path / 'flowers'}")
    assert read_in_a_process()[3] == here.fingerprint
