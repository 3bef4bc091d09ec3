"""Making the tables: in pieces, in order of worth, with every figure from a saved artifact."""

import json
import math

import pytest
from commands import ROOT, TINY

from distilled_data import DistilledDataset
from ncfm_engine.presets import PRESETS
from tools.reproduction import campaign, readme
from tools.reproduction.findings import Finding, difference, is_kept, markdown
from tools.reproduction.ranking import augmentation_robust_score, label_robust_score
from tools.reproduction.summary import scores
from tools.reproduction.tables import ARCHITECTURES, PAPER, TABLES

SMALL = [*TINY, "distill.iterations=6", "evaluate.epochs=2"]
ROW = ("reproduce.py", "digits", "--row", "digits-ipc1", "--results", "results")


@pytest.fixture(autouse=True)
def _one_architecture(monkeypatch):
    """The others take a minute each on a CPU."""
    monkeypatch.setattr(campaign, "STAGES", (campaign.DISTIL, campaign.PLAIN, "alexnet"))


def summary(folder) -> dict:
    return json.loads((folder / "digits" / "results.json").read_text())


def untimed(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "stages", "command")} for row in rows]


def test_a_campaign_in_many_pieces_comes_to_what_one_piece_comes_to(here, tmp_path):
    assert here(*ROW, "--work", "whole", settings=SMALL)[0] == 0
    [whole] = summary(tmp_path / "results")["sets"]
    statuses = []
    while not statuses or statuses[-1] == 75:
        budget = f"{0.1 * (len(statuses) + 1):.1f}s"
        parts = ("--work", "parts", "--results", "pieces", "--time-budget", budget)
        statuses.append(here("reproduce.py", "digits", "--row", "digits-ipc1", *parts, settings=SMALL)[0])
    assert statuses[-1] == 0
    assert len(statuses) > 3
    [pieces] = summary(tmp_path / "pieces")["sets"]
    assert untimed(pieces["rows"]) == untimed(whole["rows"])
    assert {name: value for name, value in pieces.items() if name not in ("rows", "stages")} == {
        name: value for name, value in whole.items() if name not in ("rows", "stages")
    }


def test_a_row_has_every_figure_and_an_artifact_that_loads(here, tmp_path):
    assert here(*ROW, settings=SMALL)[0] == 0
    folder = tmp_path / "results" / "digits" / "digits-ipc1"
    dataset = DistilledDataset.from_folder(folder)
    dataset.verify()
    [row] = summary(tmp_path / "results")["sets"]
    kinds = {(r["network"], r["labels"], r["protocol"]) for r in row["rows"]}
    assert kinds == {
        ("convnet", "hard", "ncfm"),
        ("convnet", "soft", "ncfm"),
        ("convnet", "hard", "ncfm without augmentation"),
        ("convnet", "soft", "ncfm without augmentation"),
        ("alexnet", "hard", "ncfm"),
    }
    names = (
        "dataset ipc network protocol labels n last_mean last_std best_mean best_std random_mean random_std "
        "full_mean full_std seconds device versions seed content_hash command"
    )
    for result in row["rows"]:
        assert set(names.split()) <= set(result)
        assert result["content_hash"] == dataset.content_hash
    assert row["bytes"] == (folder / "distilled.safetensors").stat().st_size
    assert {"pretraining", "distilling", "labelling", "evaluating", "evaluating, alexnet"} <= set(
        row["stages"]
    )
    assert row["lrs"] is not None
    assert row["ars"] is not None
    assert (tmp_path / "results" / "digits" / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "results" / "digits" / "table.md").read_text()
    for title in (
        "hard labels, last epoch",
        "random real images, soft labels",
        "AlexNet",
        "(LRS)",
        "(ARS)",
        "bytes",
    ):
        assert title in text


def test_what_is_done_is_not_done_again(here, tmp_path, monkeypatch):
    assert here(*ROW, settings=SMALL)[0] == 0
    before = summary(tmp_path / "results")

    def forbidden(*arguments, **options):
        raise AssertionError("it was all there")

    for name in ("run", "evaluate_folder"):
        monkeypatch.setattr(campaign, name, forbidden)
    (tmp_path / "results" / "digits" / "table.md").unlink()
    assert here(*ROW, settings=SMALL)[0] == 0
    assert summary(tmp_path / "results") == before
    assert (tmp_path / "results" / "digits" / "table.md").exists()


def test_another_recipe_is_not_taken_for_the_one_that_is_there(here, tmp_path):
    assert here(*ROW, settings=SMALL)[0] == 0
    status, _, error = here(*ROW, settings=[*SMALL, "distill.alpha=0.4"])
    assert status != 0
    assert "distill.alpha is 0.5 there and 0.4 here" in " ".join(error.split())


def test_a_damaged_artifact_is_made_again_from_its_checkpoint(here, tmp_path):
    assert here(*ROW, settings=SMALL)[0] == 0
    path = tmp_path / "reproduced" / "digits" / "digits-ipc1" / "distilled.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert here(*ROW, settings=SMALL)[0] == 0
    assert path.read_bytes() == whole


def test_the_most_telling_rows_come_first():
    names = [row.name for row in TABLES["published"]]
    assert names[:4] == ["cifar10-ipc10", "cifar100-ipc10", "cifar10-ipc50", "cifar100-ipc50"]
    assert set(names[4:]) == {"cifar10-ipc1", "cifar100-ipc1"}
    made = campaign.Campaign(TABLES["published"], names, None, None, {}, {})  # type: ignore[arg-type]
    assert [stage for _, stage in made.tasks()][:6] == [campaign.DISTIL] * 6


def test_every_row_is_a_recipe_and_the_published_ones_have_published_figures():
    for table in TABLES.values():
        for row in table:
            recipe = PRESETS[row.preset].recipe().replace(dict(row.changes))
            recipe.replace(dict(row.architectures))
            assert row.name.endswith(f"-ipc{recipe.ipc}")
    assert {row.name for row in TABLES["published"]} == {f"{name}-ipc{ipc}" for name, ipc in PAPER}
    assert ARCHITECTURES == ("resnet18", "vgg11", "alexnet")


def test_a_dry_run_counts_and_makes_nothing(here, tmp_path):
    status, output, _ = here(*ROW, "--dry-run", "--rate", "0.001")
    assert status == 0
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "reproduced").exists()
    petaflop = [float(cell) for cell in output.splitlines()[1].split()[1:4]]
    assert float(output.splitlines()[1].split()[-1]) == pytest.approx(sum(petaflop) * 1e6 / 3600, rel=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name a table: published, half-hour, small, digits"),
        (("digit",), "digits"),
        (("digits", "--row", "digits-ipc2"), "digits-ipc1"),
        (("digits", "--source", "digits"), "field=value"),
    ],
)
def test_a_name_that_does_not_exist_is_refused(here, words, message):
    status, _, error = here("reproduce.py", *words)
    assert status == 2
    assert message in " ".join(error.split())


def test_scores_are_those_of_their_definition():
    # a = IOR / 2 - HLR / 2; the normalisation maps -1 to 0 and 1 to 1
    assert label_robust_score(full=1.0, hard=0.0, own=0.0, random=1.0) == pytest.approx(0)
    assert label_robust_score(full=0.0, hard=1.0, own=1.0, random=0.0) == pytest.approx(1)
    middle = (1 - math.exp(-1)) / (math.exp(1) - math.exp(-1))
    assert label_robust_score(full=0.8, hard=0.6, own=0.7, random=0.5) == pytest.approx(middle)
    assert augmentation_robust_score(-1, -1) == pytest.approx(0)
    assert augmentation_robust_score(1, 1) == pytest.approx(1)
    assert augmentation_robust_score(0.2, -0.2) == pytest.approx(middle)


def test_scores_compare_soft_labels_with_random_images_under_the_same():
    def row(labels, last, random, protocol="ncfm", full=None):
        names = {"network": "convnet", "labels": labels, "protocol": protocol}
        return names | {"last_mean": last, "random_mean": random, "full_mean": full}

    rows = [
        row("hard", 60, 30, full=80),
        row("soft", 70, 50),
        row("soft", 40, 30, "ncfm without augmentation"),
    ]
    expected = {
        "lrs": label_robust_score(0.8, 0.6, 0.7, 0.5),
        "ars": augmentation_robust_score(0.2, 0.1),
    }
    found = scores(rows, "convnet")
    assert found == {name: pytest.approx(value, abs=1e-3) for name, value in expected.items()}
    assert scores(rows[:1], "convnet")["ars"] is None


def finding(name: str, values: list[float], changes=None) -> Finding:
    return Finding(
        name, changes or {}, [{"accuracy": value, "seconds": 1.0, "curve": {}} for value in values]
    )


def test_a_difference_has_the_standard_error_of_both_means():
    gain, error = difference(finding("a", [12.0, 14.0, 16.0]), finding("b", [9.0, 10.0, 11.0]))
    assert gain == 4
    assert error == pytest.approx(math.sqrt(4 / 3 + 1 / 3))
    assert difference(finding("a", [12.0]), finding("b", [9.0, 10.0]))[1] is None


def test_a_finding_is_kept_if_the_set_of_the_table_is_made_so():
    row = TABLES["small"][0]
    name, value = next(iter(row.changes.items()))
    assert is_kept({name: value}, row.preset)
    assert not is_kept({"distill.alpha": "0.123"}, row.preset)
    assert is_kept({"distill.factor": "1"}, "digits")


def test_a_study_of_several_sizes_is_one_table(tmp_path):
    for ipc, mean in ((10, 50.0), (1, 30.0)):
        rows = [
            finding("the preset", [mean, mean + 2]),
            finding("alpha 1", [mean + 3, mean + 5], {"distill.alpha": "1"}),
        ]
        content = {"study": "claims", "preset": "digits", "dataset": "digits", "ipc": ipc}
        path = tmp_path / f"study-claims-digits-ipc{ipc}.json"
        path.write_text(json.dumps(content | {"findings": [row.row() for row in rows]}))
    lines = markdown(sorted(tmp_path.iterdir())).splitlines()
    head = "| {} per class | n | against the preset | kept "
    assert lines[0] == "| change " + head.format(1) + head.format(10) + "|"
    assert lines[2] == "| the preset | 31.0 ± 1.4 | 2 |  |  | 51.0 ± 1.4 | 2 |  |  |"
    assert lines[3] == "| alpha 1 | 34.0 ± 1.4 | 2 | +3.0 ± 1.4 | no | 54.0 ± 1.4 | 2 | +3.0 ± 1.4 | no |"


def test_a_part_of_the_readme_is_the_file_it_names(tmp_path):
    (tmp_path / "table.md").write_text("| new |\n")
    text = "before\n<!-- begin: table.md -->\n| old |\n<!-- end -->\nafter\n"
    assert readme.fill(text, tmp_path) == text.replace("old", "new")
    with pytest.raises(Exception, match=r"part for absent\.md, which does not exist"):
        readme.fill(text.replace("table.md", "absent.md"), tmp_path)


def test_the_tables_of_the_readme_are_made_from_the_results():
    pages = readme.render_results(ROOT / "tools" / "results")
    for path, text in pages.items():
        assert path.read_text() == text, (
            f"{path.name} is not what its results say: tools/reproduce.py --readme"
        )
    text = (ROOT / "README.md").read_text()
    assert readme.fill(text, ROOT) == text
