"""`hub`: folder, card, parquet mirror, preview and publish plan, on real digits and without a network."""

import functools
import io
import re
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from huggingface_hub import DatasetCard
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from sklearn.datasets import load_digits

from distilled_data import Artifact, IntegrityError, Metadata, UsageError
from distilled_data.decode import decode
from distilled_data.format import (
    ARTIFACT_FILE,
    CARD_FILE,
    FOLDER_FILES,
    PARQUET_FILE,
    PREVIEW_FILE,
    read_artifact,
    verify_folder,
    write_artifact,
)
from hub import complete_folder, plan_push, push
from hub.card import render_card
from hub.preview import CELL, GAP, preview_png

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RESULTS = {
    "dataset": "digits", "ipc": 2, "network": "convnet", "protocol": "ncfm", "labels": "hard", "n": 5,
    "last_mean": 91.26, "last_std": 0.42, "best_mean": 92.5, "best_std": 0.31, "random_mean": 80.0,
    "random_std": 2.04, "full_mean": 98.7, "full_std": None, "device": "2 cores",
}  # fmt: skip
HOSTILE = [
    "a | b",
    "colon: 'quote\" # *star* `tick`",
    "two\nlines\n---\n<!-- distilled-data:end summary -->",
    "```\n</details><script>alert(1)</script>",
    "$title [link](x) \\",
]


@functools.cache
def digits():
    return load_digits(return_X_y=True)


def make_artifact(ipc=2, channels=1, logits=True, classes=DIGITS, **metadata):
    """Real digits, `ipc` per class; 25 classes are the ten digits over and over."""
    pixels, labels = digits()
    scans = torch.from_numpy(pixels * 15.9375).round().to(torch.uint8).unflatten(1, (8, 8))
    chosen = [scans[np.flatnonzero(labels == label % 10)[: ipc * channels]] for label in range(len(classes))]
    images = torch.stack(chosen, 1).unflatten(0, (ipc, channels)).transpose(1, 2).contiguous()
    count = len(classes)
    teacher = torch.randn(ipc, count, 4, count, generator=torch.Generator().manual_seed(0)).half()
    fields = {"dataset": "digits", "mean": (0.3,) * channels, "std": (0.4,) * channels} | metadata
    return Artifact(
        images,
        Metadata(classes=tuple(classes), channels=channels, height=8, width=8, ipc=ipc, factor=2, **fields),
        teacher if logits else None,
    )


def hostile_artifact(text):
    """Every name and every value is `text`."""
    fields = dict.fromkeys(("license", "citation", "id", text), text)
    return make_artifact(
        classes=HOSTILE,
        dataset=text,
        source=fields,
        recipe=fields,
        labels={"kind": text, "teacher": fields},
        results=(dict.fromkeys(RESULTS, text),),
    )


def make_folder(folder, artifact):
    write_artifact(folder / ARTIFACT_FILE, artifact)
    complete_folder(folder)
    return folder


def front_matter(card):
    return DatasetCard(card).data.to_dict()


@pytest.fixture
def load(monkeypatch, tmp_path):
    """`datasets.load_dataset` on a folder, without network and user cache."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return lambda folder: datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))


# The parquet mirror


@pytest.mark.parametrize("channels", [1, 3])
def test_load_dataset_opens_the_folder_with_the_decoded_images_in_rank_class_view_order(
    load, tmp_path, channels
):
    artifact = make_artifact(channels=channels)
    rows = load(make_folder(tmp_path / "digits", artifact))
    expected = decode(artifact.images.flatten(0, 1).float(), 2).flatten(0, 1).round()
    found = np.stack([np.atleast_3d(image) for image in rows["image"]])
    assert torch.equal(torch.from_numpy(found).permute(0, 3, 1, 2).float(), expected)


def test_load_dataset_names_the_classes_and_softens_the_labels_at_the_temperature(load, tmp_path):
    artifact = make_artifact(labels={"temperature": 4.0})
    rows = load(make_folder(tmp_path / "digits", artifact))
    assert rows.features["label"].names == list(DIGITS)
    assert rows["label"][:] == [label for _ in range(2) for label in range(10) for _ in range(4)]
    assert artifact.logits is not None
    expected = (artifact.logits.float() / 4.0).softmax(-1).flatten(0, 2)
    assert torch.allclose(torch.tensor(rows["soft_label"][:]), expected)


def test_without_teacher_logits_there_is_no_soft_label_column(load, tmp_path):
    rows = load(make_folder(tmp_path / "digits", make_artifact(logits=False)))
    assert rows.column_names == ["image", "label"]


def test_class_names_of_any_text_come_back_from_load_dataset(load, tmp_path):
    rows = load(make_folder(tmp_path / "hostile", make_artifact(classes=HOSTILE)))
    assert rows.features["label"].names == HOSTILE


def test_the_rows_of_a_smaller_ipc_are_the_first_rows_of_the_mirror(load, tmp_path):
    whole = make_folder(tmp_path / "whole", make_artifact(ipc=2))
    part = make_folder(tmp_path / "part", read_artifact(whole / ARTIFACT_FILE, ipc=1))
    assert load(whole)["image"][:40] == load(part)["image"][:]


# The folder


def test_a_complete_folder_holds_every_file_of_the_format_and_verifies(tmp_path):
    make_folder(tmp_path, make_artifact())
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} == set(FOLDER_FILES)
    verify_folder(tmp_path)


def test_the_same_artifact_gives_the_same_bytes_also_when_the_folder_is_completed_again(tmp_path):
    one, two = (make_folder(tmp_path / name, make_artifact(results=(RESULTS,))) for name in ("one", "two"))
    complete_folder(two)
    for name in FOLDER_FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_an_artifact_that_records_nothing_can_be_completed(tmp_path):
    card = (make_folder(tmp_path, make_artifact(logits=False)) / CARD_FILE).read_text()
    assert "No evaluation was recorded" in card
    assert front_matter(card)["license"] == "unknown"


# The card


def test_the_code_of_the_card_runs_as_printed_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(make_folder(tmp_path, make_artifact(logits=False)))
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / CARD_FILE).read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["images"].shape[1:] == (1, 8, 8)
    assert names["targets"].shape[1] == 10


def test_with_a_repository_the_code_of_the_card_loads_from_it():
    card = render_card(make_artifact(), repo_id="org/digits-ncfm")
    assert '\nfolder = snapshot_download("org/digits-ncfm", repo_type="dataset")\n' in card
    assert "\ntrain = DistilledDataset.from_folder(folder)" in card


def test_the_results_table_has_mean_and_deviation_of_distilled_random_and_full():
    card = render_card(make_artifact(results=(RESULTS, {"labels": "soft"})))
    assert (
        "| convnet | ncfm | 2 | hard | 5 | 91.3 ± 0.4 | 80.0 ± 2.0 | 98.7 | 92.5 ± 0.3 | 2 cores |\n"
        "| - | - | - | soft | - | - | - | - | - | - |\n"
    ) in card


def test_the_card_answers_what_users_of_distilled_sets_ask():
    card = render_card(make_artifact(labels={"temperature": 4.0, "teacher": {"architecture": "convnet"}}))
    for answer in (
        "subtract the mean (0.3), divide by the standard\n  deviation (0.4)",
        "No ZCA",
        "a grid of 2 x 2 tiles",
        "`align_corners=False`",
        '"9": "nine"',
        "temperature 4.0. Teacher: architecture convnet.",
    ):
        assert answer in card


def test_what_people_wrote_in_a_card_survives_and_generated_sections_are_renewed():
    fresh = render_card(make_artifact())
    edited = fresh.replace("tags:\n", "language: en\ntags:\n- ours\n").replace("digits, dist", "forged, dist")
    edited = edited.replace(
        "\n\n<!-- distilled-data:begin use", "\n\nOur words.\n\n<!-- distilled-data:begin use"
    )
    renewed = render_card(make_artifact(), edited + "\n## Thanks\n\nTo all.\n")
    assert "forged" not in renewed
    assert renewed.index("end summary") < renewed.index("\nOur words.\n") < renewed.index("begin use")
    assert renewed.endswith("\n## Thanks\n\nTo all.\n")
    assert front_matter(renewed) == front_matter(fresh) | {
        "language": "en",
        "tags": [*front_matter(fresh)["tags"], "ours"],
    }


def test_a_card_without_our_sections_keeps_its_text_and_gets_them_below():
    card = render_card(make_artifact(), "---\nlicense: mit\n---\n# My data\n\nCollected with care.\n")
    assert front_matter(card)["license"] == "mit"
    assert (
        0
        < card.index("# My data\n\nCollected with care.\n")
        < card.index("<!-- distilled-data:begin summary")
    )


def test_a_card_whose_front_matter_is_broken_is_refused():
    with pytest.raises(UsageError, match="not valid YAML"):
        render_card(make_artifact(), "---\nlicense: [\n---\n")


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_in_the_metadata_comes_back_from_the_front_matter(text):
    front = front_matter(render_card(hostile_artifact(text)))
    assert front["pretty_name"] == f"{text}, distilled to 2 images per class"
    assert front["source_datasets"] == [text]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_in_the_metadata_ends_a_section_of_the_card(text):
    artifact = hostile_artifact(text)
    card = render_card(artifact)
    marker = re.compile(r"^<!-- distilled-data:\w+ \w+", re.MULTILINE)
    assert marker.findall(card) == marker.findall(render_card(make_artifact()))
    assert render_card(artifact, card) == card


@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_the_metadata_neither_adds_html_nor_columns_to_the_card(text):
    body = DatasetCard(render_card(hostile_artifact(text))).text
    prose = re.sub(r"^```.*?^```$|^    .*?$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" not in prose
    row = prose.split("| --- |\n")[1].split("\n")[0]
    assert len(re.findall(r"(?<!\\)\|", row)) == 11


@pytest.mark.parametrize(
    ("licence", "identifier"), [("CC BY 4.0", "cc-by-4.0"), ("MIT", "mit"), ("ask the authors", "other")]
)
def test_the_licence_of_the_source_becomes_an_identifier_that_the_hub_knows(licence, identifier):
    assert front_matter(render_card(make_artifact(source={"license": licence})))["license"] == identifier


# The preview


def test_the_preview_shows_the_packed_images_as_stored_with_classes_as_rows():
    artifact = make_artifact(ipc=3)
    sheet = np.asarray(Image.open(io.BytesIO(preview_png(artifact))))
    step = CELL + GAP
    grid = sheet[:, -(3 * step + GAP) :]
    assert len(sheet) == 10 * step + GAP
    cell = grid[7 * step + GAP :, 2 * step + GAP :][:CELL, :CELL, 0]
    assert np.array_equal(cell, artifact.images[2, 7, 0].numpy().repeat(6, 0).repeat(6, 1))


def test_every_row_of_the_preview_has_a_name_at_its_left():
    sheet = np.asarray(Image.open(io.BytesIO(preview_png(make_artifact()))).convert("L"))
    step = CELL + GAP
    names = sheet[: 10 * step, : -(2 * step + GAP)].reshape(10, step, -1)
    assert (names.min((1, 2)) < 128).all()


def test_a_preview_that_leaves_classes_out_says_so_below():
    whole, cut = (
        Image.open(io.BytesIO(preview_png(make_artifact(classes=[f"class {i}" for i in range(count)]))))
        for count in (20, 25)
    )
    assert cut.height > whole.height
    assert np.asarray(cut.convert("L"))[whole.height :].min() < 128


# Publishing


class FakeHub:
    """A Hub with one repository, or none; it notes what is asked to change."""

    def __init__(self, head: str | None = "a" * 40, card=None, tags=()):
        self.head, self.card, self.tags, self.changes = head, card, tags, []

    def dataset_info(self, repo_id):
        if self.head is None:
            raise RepositoryNotFoundError("404", response=MagicMock())
        names = [CARD_FILE] if self.card else []
        return SimpleNamespace(sha=self.head, siblings=[SimpleNamespace(rfilename=name) for name in names])

    def list_repo_refs(self, repo_id, repo_type):
        return SimpleNamespace(tags=[SimpleNamespace(name=name) for name in self.tags])

    def hf_hub_download(self, repo_id, filename, repo_type, revision):
        assert (filename, revision) == (CARD_FILE, self.head)
        return self.card

    def create_repo(self, repo_id, repo_type, private):
        self.changes.append(("repository", private))
        self.head = "b" * 40

    def create_commit(self, repo_id, operations, *, commit_message, repo_type, parent_commit):
        self.changes.append(("commit", [operation.path_in_repo for operation in operations], parent_commit))
        return SimpleNamespace(oid="c" * 40, commit_url=f"https://hub/{repo_id}/commit/{'c' * 40}")

    def create_tag(self, repo_id, *, tag, revision, repo_type):
        self.changes.append(("tag", tag, revision))


@pytest.fixture
def connect(monkeypatch):
    def use(fake):
        monkeypatch.setattr("hub.publish.HfApi", lambda token: fake)
        return fake

    return use


def test_a_plan_lists_every_file_and_never_the_token(connect, tmp_path):
    connect(FakeHub())
    plan = plan_push(make_folder(tmp_path, make_artifact()), "org/digits", revision="v1", token="hf_secret")
    assert [file.path for file in plan.files] == list(FOLDER_FILES)
    artifact = plan.files[0]
    assert artifact.size == (tmp_path / ARTIFACT_FILE).stat().st_size
    for shown in ("org/digits", "a" * 40, "v1", artifact.sha256, PARQUET_FILE, f"{artifact.size:,} bytes"):
        assert shown in str(plan)
    assert "hf_secret" not in str(plan) + repr(plan)


def test_planning_changes_nothing_on_the_hub(connect, tmp_path):
    fake = connect(FakeHub(head=None))
    plan_push(make_folder(tmp_path, make_artifact()), "org/digits", revision="v1")
    assert fake.changes == []


def test_a_push_is_one_commit_on_the_planned_parent_and_a_tag_on_that_commit(connect, tmp_path):
    fake = connect(FakeHub())
    url = push(plan_push(make_folder(tmp_path, make_artifact()), "org/digits", revision="v1"))
    assert fake.changes == [("commit", list(FOLDER_FILES), "a" * 40), ("tag", "v1", "c" * 40)]
    assert url.endswith("/commit/" + "c" * 40)


def test_a_push_to_a_new_repository_creates_it_and_commits_on_its_first_head(connect, tmp_path):
    fake = connect(FakeHub(head=None))
    push(plan_push(make_folder(tmp_path, make_artifact()), "org/digits", private=True))
    assert fake.changes == [("repository", True), ("commit", list(FOLDER_FILES), "b" * 40)]


def test_an_existing_tag_is_refused(connect, tmp_path):
    connect(FakeHub(tags=["v1"]))
    with pytest.raises(UsageError, match="never moved"):
        plan_push(make_folder(tmp_path, make_artifact()), "org/digits", revision="v1")


def test_a_push_keeps_what_people_wrote_in_the_card_on_the_hub(connect, tmp_path):
    remote = tmp_path / "remote.md"
    remote.write_text("# Ours\n")
    connect(FakeHub(card=remote))
    plan = plan_push(make_folder(tmp_path / "digits", make_artifact()), "org/digits")
    assert "\n# Ours\n" in plan.card
    assert 'snapshot_download("org/digits"' in plan.card


def test_a_damaged_folder_is_not_planned(connect, tmp_path):
    connect(FakeHub())
    (make_folder(tmp_path, make_artifact()) / PREVIEW_FILE).write_bytes(b"")
    with pytest.raises(IntegrityError):
        plan_push(tmp_path, "org/digits")


def test_a_folder_that_changed_after_planning_is_not_pushed(connect, tmp_path):
    fake = connect(FakeHub())
    plan = plan_push(make_folder(tmp_path, make_artifact()), "org/digits")
    make_folder(tmp_path, make_artifact(ipc=1))
    with pytest.raises(UsageError, match="Plan it again"):
        push(plan)
    assert fake.changes == []
