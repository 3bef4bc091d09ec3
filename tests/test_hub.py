"""`hub`: folder, card, parquet mirror and preview, on real digits and without a network."""

import dataclasses
import io
import itertools
import re

import numpy as np
import pytest
import torch
from artifacts import DIGITS, make_artifact, make_folder
from commands import ROOT
from huggingface_hub import DatasetCard
from PIL import Image, ImageDraw
from pyarrow.parquet import ParquetFile

from distilled_data import Artifact, DistilledDataset, UsageError
from distilled_data.decode import decode
from distilled_data.format import ARTIFACT_FILE, CARD_FILE, FOLDER_FILES, PARQUET_FILE, read_artifact
from distilled_data.manifest import verify_folder
from hub import complete_folder, mirror
from hub.card import render_card, text_of
from hub.preview import CELL, GAP, preview_png

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


def test_a_rank_of_many_views_is_mirrored_part_by_part(load, tmp_path, monkeypatch):
    whole = load(make_folder(tmp_path / "whole", make_artifact()))
    monkeypatch.setattr(mirror, "AT_ONCE", 15)
    parts = make_folder(tmp_path / "parts", make_artifact())
    groups = ParquetFile(parts / PARQUET_FILE).metadata
    assert [groups.row_group(group).num_rows for group in range(6)] == [15, 15, 10] * 2
    for name in ("image", "label", "soft_label"):
        assert load(parts)[name][:] == whole[name][:]


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
    assert "**Labels.** The class alone; there are no soft labels." in card
    front = front_matter(card)
    assert front["license"] == "unknown"
    assert (front["library_name"], front["task_categories"]) == ("distilled-data", ["image-classification"])


# The card


def test_the_code_of_the_card_runs_as_printed_in_the_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(make_folder(tmp_path, make_artifact(logits=False)))
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / CARD_FILE).read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["images"].shape[1:] == (1, 8, 8)
    assert names["targets"].shape[1] == 10
    [code] = re.findall(r"`(datasets\.load_dataset\(.*?\))`", (tmp_path / CARD_FILE).read_text())
    rows = eval(code, {"datasets": datasets})["train"]
    assert rows.features["label"].names == list(DIGITS)
    assert len(rows) == len(DistilledDataset.from_folder("."))


def test_with_a_repository_the_code_of_the_card_loads_from_it():
    card = render_card(make_artifact(), repo_id="org/digits-ncfm")
    assert '\ntrain = DistilledDataset.from_hub("org/digits-ncfm")\n' in card
    assert '`datasets.load_dataset("org/digits-ncfm")`' in card


def test_the_results_table_has_mean_and_deviation_of_distilled_random_and_full():
    card = render_card(make_artifact(results=(RESULTS, {"labels": "soft"})))
    assert (
        "| Network | Protocol | Images per class | Labels | Runs | Distilled | Random real images "
        "| Full dataset | Distilled, best epoch | Measured on |\n"
        f"{'| --- ' * 10}|\n"
        "| convnet | ncfm | 2 | hard | 5 | 91.3 ± 0.4 | 80.0 ± 2.0 | 98.7 | 92.5 ± 0.3 | 2 cores |\n"
        "| - | - | - | soft | - | - | - | - | - | - |\n"
    ) in card
    assert "held out" not in card
    assert "The test set has" not in card


def test_a_result_that_is_no_percentage_does_not_keep_a_set_from_its_card():
    assert "| - |" in render_card(make_artifact(results=(RESULTS | {"last_mean": 10**400, "last_std": 1},)))


def test_the_card_says_how_many_test_images_there_were_where_all_rows_agree():
    held_out = {"split": "validation 0.1", "test_images": 143}
    few, many = (RESULTS | {"test_images": count} for count in (71, 359))
    assert "The test set has 71 images." in render_card(
        make_artifact(results=(few, RESULTS, RESULTS | held_out))
    )
    assert "The test set has" not in render_card(make_artifact(results=(few, many)))
    assert "The test set has" not in render_card(make_artifact(results=(RESULTS | held_out,)))


def test_the_card_says_how_many_runs_the_full_dataset_had_and_what_is_no_test_set():
    card = render_card(
        make_artifact(results=(RESULTS | {"full_n": 3, "epochs": 7, "split": "validation 0.1"},))
    )
    assert (
        "| convnet | ncfm, 7 epochs, validation 0.1 | 2 | hard | 5 | 91.3 ± 0.4 | 80.0 ± 2.0 | 98.7 (3) |"
        in card
    )
    assert 'Rows of "validation" were tested on training images that were held out' in card


def test_the_card_tells_rows_of_other_settings_apart():
    changes = "evaluate.learning_rate = 0.01, network.width = 4"
    card = render_card(make_artifact(results=(RESULTS, RESULTS | {"changes": changes})))
    assert "| convnet | ncfm | 2 | hard |" in card
    assert r"| convnet | ncfm, evaluate.learning\_rate = 0.01, network.width = 4 | 2 | hard |" in card


def test_the_card_says_what_labels_by_the_teacher_are_where_there_are_any():
    told = "labelled every augmented batch"
    assert told in render_card(make_artifact(results=(RESULTS, {"labels": "teacher"})))
    assert told not in render_card(make_artifact(results=(RESULTS,)))


def test_the_card_says_that_other_networks_labelled_the_random_images_than_a_set_of_others():
    told = "The soft labels of the random images are of other networks"
    soft, ours = RESULTS | {"labels": "soft"}, {"settings": {}}
    assert told in render_card(make_artifact(results=(RESULTS, soft)))
    assert told in render_card(
        {"a": make_artifact(1, recipe=ours), "b": make_artifact(2, results=(soft,))}, repo_id="org/sets"
    )
    for artifact in (make_artifact(results=(RESULTS,)), make_artifact(results=(soft,), recipe=ours)):
        assert told not in render_card(artifact)


def test_the_card_has_the_citation_of_the_source():
    card = render_card(make_artifact(1, source={"citation": "@misc{digits}"}))
    assert "Please cite the source:\n\n    @misc{digits}" in card


@pytest.mark.parametrize(
    "card", sorted(ROOT.glob("tools/results/*/*/README.md")), ids=lambda path: path.parent.name
)
def test_the_cards_of_the_results_are_as_cards_are_now(card):
    text = card.read_text()
    assert render_card(read_artifact(card.parent / ARTIFACT_FILE), text) == text


def test_the_card_answers_what_users_of_distilled_sets_ask():
    labels = {"temperature": 4.0, "teacher": {"architecture": "convnet"}}
    card = render_card(make_artifact(labels=labels, recipe={"settings": {}}))
    for answer in (
        "subtract the mean (0.3), divide by the standard\n  deviation (0.4)",
        "No ZCA",
        "a grid of 2 x 2 tiles",
        "enlarged to 8 x 8 pixels",
        "so that each class has 8 training images.",
        "\n20 synthetic images, 2 for each of 10 classes, that stand in for",
        "`ipc=k` loads only the first k images of each class.",
        "`align_corners=False`",
        '"9": "nine"',
        "temperature 4.0. Teacher: architecture convnet.",
    ):
        assert answer in card
    unknown = render_card(make_artifact(recipe={"settings": {}}))
    assert "with the temperature 1.0. Teacher: not recorded." in unknown


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


def test_comments_in_the_front_matter_are_kept():
    card = "---\n# see the spec\nlanguage: en\nlicense: mit\n# our note\nextra: 1\n## our note\n---\nHello.\n"
    for _ in range(2):
        card = render_card(make_artifact(), card)
        front, _, _ = card[4:].partition("\n---\n")
        assert front.endswith("\n# see the spec\n# our note\nlanguage: en\nextra: 1\n## our note")
        assert front.count("#") == 4


def test_a_card_without_our_sections_keeps_its_text_and_gets_them_below():
    card = render_card(make_artifact(), "---\nlicense: mit\n---\n# My data\n\nCollected with care.\n")
    assert front_matter(card)["license"] == "mit"
    assert (
        0
        < card.index("# My data\n\nCollected with care.\n")
        < card.index("<!-- distilled-data:begin summary")
    )


def test_empty_front_matter_is_filled():
    assert render_card(make_artifact(), "---\n---\n") == render_card(make_artifact())


def test_a_card_whose_front_matter_is_broken_is_refused():
    with pytest.raises(UsageError, match="not valid YAML"):
        render_card(make_artifact(), "---\nlicense: [\n---\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        render_card(make_artifact(), f"---\nlicense: {'[' * 9999}\n---\n")
    for tags in ("5", "[{a: b}]", "{a: b}"):
        with pytest.raises(UsageError, match="must be a list of words"):
            render_card(make_artifact(), f"---\ntags: {tags}\n---\n")


def test_a_card_that_is_a_link_to_another_place_is_refused_and_one_of_the_cache_is_read(tmp_path):
    folder = tmp_path / "datasets--org--digits" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    make_folder(folder, make_artifact())
    (folder / CARD_FILE).unlink()
    (tmp_path / "key").write_text("secret")
    (folder / CARD_FILE).symlink_to(tmp_path / "key")
    with pytest.raises(UsageError, match=r"README\.md is a link to .*key, outside of the folder"):
        complete_folder(folder)
    blob = folder.parents[1] / "blobs" / "abc"
    blob.parent.mkdir()
    blob.write_text("Our words.")
    (folder / CARD_FILE).unlink()
    (folder / CARD_FILE).symlink_to(blob)
    complete_folder(folder)
    assert "Our words." in (folder / CARD_FILE).read_text()


def test_a_card_that_is_not_utf_8_is_refused_and_left(tmp_path):
    folder = make_folder(tmp_path, make_artifact())
    (folder / "README.md").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UsageError, match=r"README\.md is not UTF-8 text"):
        complete_folder(folder)
    assert (folder / "README.md").read_bytes() == b"caf\xe9"
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    with pytest.raises(UsageError, match=r"README\.md cannot be read: Is a directory"):
        complete_folder(folder)


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


def test_a_card_over_several_sets_describes_each_and_starts_with_the_default_one():
    card = render_card(
        {"ipc2": make_artifact(2, results=(RESULTS,)), "ipc1": make_artifact(1)}, repo_id="org/digits"
    )
    front = front_matter(card)
    assert front["pretty_name"] == "digits, distilled to 1 and 2 images per class"
    assert [(c["config_name"], c.get("default"), c["data_files"][0]["path"]) for c in front["configs"]] == [
        ("ipc2", True, "ipc2/data/train.parquet"),
        ("ipc1", None, "ipc1/data/train.parquet"),
    ]
    assert "![Contact sheet: one row of images per class](ipc2/preview.png)" in card
    assert '`datasets.load_dataset("org/digits", "ipc2")`' in card
    assert "\nSets of synthetic images, 1 and 2 images per class for 10 classes, that" in card
    assert (
        "The example loads `ipc2/`; `ipc=k` loads the set that was made for k images per\nclass, or" in card
    )
    assert card.index("What is in `ipc2/`") < card.index("What is in `ipc1/`") < card.index("## Limits")


def test_among_several_sets_a_result_of_the_first_images_of_one_is_told_from_that_of_another():
    large = make_artifact(2, results=({"ipc": 1, "last_mean": 30.0}, {"ipc": 2, "last_mean": 50.0}))
    small = make_artifact(1, results=({"ipc": 1, "last_mean": 40.0},))

    def found(sets):
        rows = [line for line in render_card(sets).splitlines() if re.search(r"\| [345]0\.0 \|", line)]
        return [(row.split(" | ")[2], row.split(" | ")[5]) for row in rows]

    expected = [("1, the first of 2", "30.0"), ("2", "50.0"), ("1", "40.0")]
    assert found({"ipc2": large, "ipc1": small}) == expected
    assert found(large) == [("1", "30.0"), ("2", "50.0")]


def test_a_card_over_sets_of_different_sources_and_licences_tells_those_of_each():
    one, two = ({"id": name, "license": licence} for name, licence in (("a", "mit"), ("b", "cc-by-4.0")))
    sets = {"ipc2": make_artifact(2, source=one), "ipc1": make_artifact(1, source=one)}
    same, single = render_card(sets), render_card(make_artifact(2, source=one))
    source = re.compile(r"^<!-- distilled-data:begin source.*end source -->", re.DOTALL | re.MULTILINE)
    assert source.findall(same) == source.findall(single)
    assert (front_matter(same)["license"], front_matter(same)["source_datasets"]) == ("mit", ["a"])
    card = render_card(sets | {"ipc3": make_artifact(3, source=two)})
    assert (front_matter(card)["license"], front_matter(card)["source_datasets"]) == ("other", ["a", "b"])
    [found] = source.findall(card)
    assert re.search(
        r"\*\*`ipc2/`, `ipc1/`:\*\* Made .* licence: mit.*\*\*`ipc3/`:\*\* .*: cc-by-4", found, re.DOTALL
    )
    unknown = render_card(sets | {"ipc3": make_artifact(3)})
    assert front_matter(unknown)["license"] == "other"


def test_a_card_that_comes_to_cover_several_sets_keeps_its_order_and_what_people_wrote():
    alone = render_card(make_artifact(2)).replace("## Limits", "## Limits of it") + "\nOur words.\n"
    alone = alone.replace(
        "\n<!-- distilled-data:begin recipe", "\nMore words.\n\n<!-- distilled-data:begin recipe"
    )
    both = render_card({"ipc2": make_artifact(2), "ipc1": make_artifact(1)}, alone)
    fresh = render_card({"ipc2": make_artifact(2), "ipc1": make_artifact(1)})
    marker = re.compile(r"^<!-- distilled-data:begin (\w+)", re.MULTILINE)
    assert marker.findall(both) == marker.findall(fresh)
    assert both.replace("More words.\n\n", "").replace("\nOur words.\n", "") == fresh


def test_a_section_that_lost_its_end_takes_no_words_with_it():
    fresh = render_card(make_artifact())
    torn = fresh.replace("<!-- distilled-data:end summary -->", "Our words.")
    once = render_card(make_artifact(), torn)
    assert "Our words." in once
    assert render_card(make_artifact(), once) == once
    assert once.count("<!-- distilled-data:end summary -->") == 1


def test_a_card_with_the_line_ends_of_windows_is_understood():
    fresh = render_card(make_artifact()).replace("license: unknown", "license: mit")
    assert render_card(make_artifact(), fresh.replace("\n", "\r\n")) == fresh


@pytest.mark.parametrize("before", ["\ufeff", "\n", "\ufeff\n\n"])
def test_what_stands_before_the_front_matter_does_not_hide_it(before):
    card = render_card(make_artifact(), text_of(f"{before}---\nlanguage: en\n---\nHello.\n".encode(), ""))
    assert front_matter(card)["language"] == "en"
    assert card.count("language: en") == 1


@pytest.mark.parametrize("line", ["language: no", "version: 1.10", "viewer: false", "x: on  # comment"])
def test_the_keys_of_others_stay_as_they_were_written(line):
    card = render_card(make_artifact(), f"---\n{line}\nmore:\n- a: 1\n  b: [x,\n    y]\n---\n")
    assert f"\n{line}\nmore:\n- a: 1\n  b: [x,\n    y]\n---\n" in card
    assert render_card(make_artifact(), card) == card


def test_front_matter_in_braces_is_kept_by_its_values():
    assert front_matter(render_card(make_artifact(), '---\n{"language": "en", "x": [1]}\n---\n'))["x"] == [1]


# The preview


def test_the_preview_shows_the_packed_images_as_stored_with_classes_as_rows():
    wide = make_artifact(ipc=3, channels=3)
    artifact = Artifact(wide.images[..., :6, :], dataclasses.replace(wide.metadata, height=6), wide.logits)
    cell = 64, 48  # eight times as large, for at least 48 pixels
    expected = Image.new("RGB", (3 * (64 + GAP) + GAP, 10 * (48 + GAP) + GAP), "white")
    for column, row in itertools.product(range(3), range(10)):
        image = Image.fromarray(artifact.images[column, row].permute(1, 2, 0).contiguous().numpy())
        expected.paste(image.resize(cell, 0), (GAP + column * (64 + GAP), GAP + row * (48 + GAP)))
    sheet = np.asarray(Image.open(io.BytesIO(preview_png(artifact))))
    assert np.array_equal(sheet[:, -expected.width :], np.asarray(expected))


def test_every_row_of_the_preview_has_a_name_at_its_left():
    sheet = np.asarray(Image.open(io.BytesIO(preview_png(make_artifact()))).convert("L"))
    step = CELL + GAP
    names = sheet[: 10 * step, : -(2 * step + GAP)].reshape(10, step, -1)
    assert (names.min((1, 2)) < 128).all()


def test_a_preview_that_leaves_classes_and_images_out_says_so_below(monkeypatch):
    drawn, draw = [], ImageDraw.ImageDraw.text

    def text(self, place, words, *rest, **options):
        drawn.append(words)
        draw(self, place, words, *rest, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    names = ["a name of\ntwo lines", "of" * 50, *(f"class {i}" for i in range(23))]
    sheets = (preview_png(make_artifact(ipc, classes=names[:n])) for ipc, n in ((10, 20), (12, 25), (11, 2)))
    whole, cut, few = (np.asarray(Image.open(io.BytesIO(sheet)).convert("L")) for sheet in sheets)
    assert drawn[20] == ""
    assert drawn[21] == "a name of two lines"
    assert re.fullmatch(r"(of){8,}o?\.\.\.", drawn[22])
    assert drawn[40:42] == ["class 17", "first 20 of 25 classes, first 10 of 12 images per class"]
    assert drawn[44] == "first 10 of 11 images per class"
    assert len(whole) == 20 * (CELL + GAP) + GAP
    grid = 10 * (CELL + GAP) + GAP
    assert np.array_equal(cut[: len(whole), -grid:], whole[:, -grid:])
    for footer in (cut[len(whole) :], few[2 * (CELL + GAP) + GAP :]):
        assert footer.min() < 128
        assert min(footer[[0, -1]].min(), footer[:, [0, -1]].min()) == 255  # the words are not cut
    assert cut[:, :GAP].min() == 255


def test_names_of_other_letters_are_drawn_with_them_and_what_no_font_has_as_a_number(monkeypatch):
    drawn, draw = {}, ImageDraw.ImageDraw.text

    def text(self, place, words, fill, font, **options):
        drawn[words] = font
        draw(self, place, words, fill, font, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    names = ["Vögel", "Vo\u0308gel", "птица", "πουλί", "鳥", "cat\nand dog"]
    preview_png(make_artifact(classes=names))
    assert list(drawn)[:6] == [*names[:4], "class 4", "cat and dog"]
    box = bytes(drawn["Vögel"].getmask("\uffff"))
    for name in names[:4]:
        assert box not in [bytes(drawn[name].getmask(letter)) for letter in name]


def test_the_card_of_a_set_made_of_tensors_says_of_what_and_under_which_licence_if_it_was_told():
    source = {"license": "MIT", "citation": "Who, 2026"}
    data = DistilledDataset.from_tensors(make_artifact().images, dataset="scans", source=source)
    source.clear()
    card = render_card(data.artifact)
    front = front_matter(card)
    assert (front["pretty_name"], front["source_datasets"], front["license"]) == (
        "scans, distilled to 2 images per class",
        ["scans"],
        "mit",
    )
    assert "Made from scans. Its licence: MIT." in card
    assert "    Who, 2026" in card


def test_the_card_of_a_set_of_others_claims_neither_our_method_nor_what_its_makers_know():
    made, converted, of_tensors = map(
        render_card,
        (
            make_artifact(recipe={"settings": {}}),
            make_artifact(recipe={"converted": "from npz"}),
            DistilledDataset.from_tensors(make_artifact().images).artifact,
        ),
    )
    assert "No ZCA whitening." in made
    assert "Raw teacher logits" in made
    for card in (converted, of_tensors):
        assert "Whether it was whitened (ZCA), its makers know." in card
        assert "teacher logits" not in card
    assert "Whether a teacher gave them or they were learned, its makers know." in converted
    recorded = render_card(make_artifact(labels={"teacher": {"architecture": "vit"}}))
    assert "Raw teacher logits" in recorded
    assert "Teacher: architecture vit." in recorded
    cards = (made, converted, of_tensors)
    assert [("ncfm" in front_matter(card)["tags"]) for card in cards] == [True, False, False]


def test_the_card_shows_the_characters_of_names_and_settings_as_they_are():
    fields = {"classes": [*DIGITS[:9], "größe"], "dataset": "Größen", "recipe": {"who": "Müller"}}
    card = render_card(make_artifact(**fields))
    assert "\npretty_name: Größen, distilled to" in card
    assert '"9": "größe"' in card
    assert '"who": "Müller"' in card


@pytest.mark.parametrize(
    ("ipc", "size"),
    [
        (24, "n<1K"),
        (25, "1K<n<10K"),
        (249, "1K<n<10K"),
        (250, "10K<n<100K"),
        (2_499, "10K<n<100K"),
        (2_500, "100K<n<1M"),
        (24_999, "100K<n<1M"),
        (25_000, "1M<n<10M"),
    ],
)
def test_the_card_counts_every_view_of_the_largest_set(ipc, size):
    small = make_artifact(1, logits=False)
    info = dataclasses.replace(small.metadata, ipc=ipc, height=2, width=2)
    large = Artifact(torch.zeros(ipc, 10, 1, 2, 2, dtype=torch.uint8), info)
    card = render_card({"ipc1": small, f"ipc{ipc}": large})
    assert front_matter(card)["size_categories"] == [size]


def test_a_section_that_its_card_lacks_comes_before_the_next_one_it_has():
    fresh = render_card(make_artifact())
    start, end = (fresh.index(f"<!-- distilled-data:begin {name}") for name in ("summary", "use"))
    assert render_card(make_artifact(), fresh[:start] + fresh[end:]) == fresh


def test_front_matter_that_is_no_table_is_refused():
    with pytest.raises(UsageError, match="must be keys and values, got 'word'"):
        render_card(make_artifact(), "---\nword\n---\n")


@pytest.mark.parametrize(("line", "message"), [("tags: {}", "list of words"), ("- {}", "keys and values")])
def test_front_matter_that_stands_for_far_more_than_it_says_is_refused(line, message):
    many = "&0 [0, 0]"
    for level in range(1, 20):
        many = f"&{level} [{many}, *{level - 1}]"
    with pytest.raises(UsageError, match=rf"{message}, got \[.{{,79}}$"):
        render_card(make_artifact(), f"---\n{line.format(many)}\n---\n")


def test_one_tag_that_is_a_word_is_kept_and_none_twice():
    made = make_artifact(recipe={"settings": {}})
    tags = front_matter(render_card(made, "---\ntags: ours\n---\n"))["tags"]
    assert tags == ["dataset-distillation", "ncfm", "distilled-data", "ours"]
    assert front_matter(render_card(made, "---\ntags: [ncfm]\n---\n"))["tags"] == tags[:3]


def test_a_section_that_its_card_lacks_comes_right_after_the_one_before_it():
    fresh = render_card(make_artifact())
    start, end = (fresh.index(f"<!-- distilled-data:begin {name}") for name in ("use", "results"))
    card = f"{fresh[:start]}Our words.\n\n{fresh[end:]}"
    assert render_card(make_artifact(), card) == f"{fresh[:end]}Our words.\n\n{fresh[end:]}"


def test_the_recipe_is_listed_but_for_its_settings_and_addresses_are_links():
    recipe = {"steps": 40, "settings": {"alpha": 0.5}}
    card = render_card(make_artifact(recipe=recipe, source={"page": "https://a.org/b_c?d=1", "id": "a_b"}))
    assert "\n- **steps**: 40\n" in card
    assert "**settings**" not in card
    assert '\n  "settings": {\n   "alpha": 0.5\n' in card
    assert "\n- **id**: a\\_b\n- **page**: <https://a.org/b_c?d=1>\n" in card
    assert "The recipe was not recorded." in render_card(make_artifact(recipe={"settings": {}}))


def test_the_card_says_only_what_is_so_of_factor_and_citation():
    packed = make_artifact(1, logits=False, dataset="it's")
    card = render_card(Artifact(packed.images, dataclasses.replace(packed.metadata, factor=1)))
    assert "Factor 1: every stored image is one training image." in card
    assert "Factor 1" not in render_card(packed)
    assert "Please cite" not in card
    assert "\n# it's, distilled to 1 image per class\n" in card


def test_the_sections_have_the_names_by_which_cards_that_are_published_are_renewed():
    card = render_card(make_artifact(source={"license": "CC BY 4.0"}))
    names = re.findall(r"^<!-- distilled-data:begin (\w+) ", card, re.MULTILINE)
    assert names == ["summary", "use", "results", "contents", "recipe", "source", "limits"]
    assert "\n## What is in it\n" in card
    assert "Its licence: CC BY 4.0." in card
    assert "Its licence: not recorded." in render_card(make_artifact())
