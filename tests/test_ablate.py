"""Studies: every variant measured, nothing made twice, whatever the moment it was stopped at."""

import itertools
import json
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from commands import TINY
from filelock import FileLock, Timeout
from interruptions import StopAfter

from distilled_data.decode import decode
from distilled_data.randomness import seed_at
from ncfm_engine.config import Recipe
from ncfm_engine.plan import make_plan
from ncfm_engine.report import silent
from ncfm_engine.stop import Stopped, StopRequest
from tools.reproduction import runs
from tools.reproduction.studies import NAMES, Variant, study

SMALL = [*TINY, "distill.iterations=4", "pretrain.epochs=1"]


def findings(path) -> dict[str, dict]:
    return {row["variant"]: row for row in json.loads(path.read_text())["findings"]}


def values(row: dict) -> list[float]:
    return [run["accuracy"] for run in row["runs"]]


@pytest.mark.parametrize("ipc", [1, 10, 50])
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_is_a_recipe(name, ipc):
    base = Recipe().replace({"ipc": ipc})
    for variant in study(name, base).values():
        assert (variant.prefix or 1) <= base.replace(dict(variant.changes)).ipc


@pytest.mark.parametrize("steps", [100, 20_000])
def test_the_variants_of_a_study_differ_from_the_preset_and_from_each_other(steps):
    recipe = Recipe().replace({"ipc": 50, "distill.iterations": steps})
    for name in NAMES:
        variants = study(name, recipe).values()
        kinds = [(recipe.replace(dict(v.changes)), v.images, v.prefix) for v in variants]
        assert all(kinds.count(kind) == 1 for kind in kinds)
    names = set(study("recipe", recipe))
    assert ("average of the images, decay 0.999" in names) == (steps > 10_000)
    assert "frequencies: 1024" not in study("claims", recipe)  # which the preset has


def test_a_recipe_that_cannot_act_in_its_few_steps_is_studied_as_any_other():
    few = Recipe().replace({"distill.iterations": 100})
    assert {"the preset", "random real images"} < set(study("recipe", few))
    assert set(study("recipe", few)) <= set(study("recipe", few.replace({"distill.ema": "0.99"})))


def test_a_variant_without_steps_does_not_prolong_the_preset_and_has_no_curve_to_draw(here, tmp_path):
    flags = ("--ipc", "1", "--seeds", "1", "--output", "rows.json", "--plot")
    chosen = ("--only", "the preset", "--only", "no steps")
    status, _, error = here("ablate.py", *flags, *chosen, settings=[*SMALL, "distill.schedule=constant"])
    assert status == 0, error
    rows = findings(tmp_path / "rows.json")
    assert rows["no steps (the real images it starts from)"]["runs"][0]["curve"] == {}
    assert rows["the preset"]["runs"][0]["curve"]["step"][-1] == 4
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_a_preset_without_images_is_studied_on_those_that_are_named(here, tmp_path):
    flags = ["ablate.py", "--preset", "tinyimagenet-ipc1", "--only", "random real images", "--seeds", "1"]
    status, _, error = here(*flags)
    assert (status, "add --dataset folder:PATH" in " ".join(error.split())) == (2, True)
    settings = [*SMALL, "network.depth=2", "evaluate.repeats=1", "evaluate.full_repeats=0"]
    flags += ["--dataset", "digits", "--output", "rows.json", "--plot"]
    status, output, error = here(*flags, settings=settings)
    assert status == 0, error
    assert "no plot: nothing was distilled" in output
    assert not (tmp_path / "rows.png").exists()
    content = json.loads((tmp_path / "rows.json").read_text())
    assert (content["preset"], content["dataset"]) == ("tinyimagenet-ipc1", "digits")
    assert content["settings"]["validation"] == 0.1  # the test set is not chosen by


def test_what_a_run_was_made_by_stays_with_it(here, tmp_path, monkeypatch):
    flags = ("ablate.py", "--ipc", "1", "--only", "random real images", "--only", "the preset")
    revisions = []
    for seeds in ("1", "2"):
        monkeypatch.setattr("ncfm_engine.provenance._code_revision", lambda seeds=seeds: f"revision {seeds}")
        status, output, _ = here(*flags, "--seeds", seeds, "--compile", "off", settings=SMALL)
        assert status == 0
        assert output.endswith("\nwritten to reproduced/results/study-recipe-digits-ipc1.json\n")
        rows = findings(tmp_path / "reproduced" / "results" / "study-recipe-digits-ipc1.json")
        revisions.append([run["code_revision"] for run in rows["the preset"]["runs"]])
        assert {run["compiled"] for row in rows.values() for run in row["runs"]} == {False}
    assert revisions == [["revision 1"], ["revision 1", "revision 2"]]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ("--only", "no such variant"),
            "no variant's name holds what --only says; they are random real images, the",
        ),
        (("--seeds", "0"), "argument --seeds: '0' is not a number, 1 or more"),
        (("--set", "evaluate.labels=teacher"), "a study trains on stored labels"),
    ],
)
def test_a_study_of_nothing_or_of_what_it_cannot_train_on_is_refused(here, words, reason):
    status, _, error = here("ablate.py", *words)
    assert status == 2
    assert reason in " ".join(error.split())


def test_what_a_study_no_longer_has_stays_in_its_file(here, tmp_path):
    said = "--ipc 1 --seeds 1 --output rows.json --only"
    flags = ("ablate.py", *said.split(), "random real images")
    assert here(*flags, settings=SMALL)[0] == 0
    path = tmp_path / "rows.json"
    path.write_text(path.read_text().replace('"variant": "random real images"', '"variant": "of old"', 1))
    assert here(*flags, settings=SMALL)[0] == 0
    assert list(findings(path))[-1] == "of old"
    assert values(findings(path)["random real images"]) == values(findings(path)["of old"])


def test_two_processes_do_not_write_one_file(here, tmp_path):
    with FileLock(tmp_path / ".rows.json.lock"):
        status, _, error = here("ablate.py", "--ipc", "1", "--output", "rows.json", settings=SMALL)
    assert status == 2
    assert "another process is at work" in " ".join(error.split())


def test_several_processes_are_refused(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in (("ablate.py",), ("reproduce.py", "digits"), ("search_architectures.py", "x")):
        status, _, error = here(*words)
        assert status == 2
        assert "for one process" in error


def test_a_study_that_is_stopped_again_and_again_finds_what_one_run_finds(here, tmp_path, monkeypatch):
    chosen = ("--only", "the preset", "--only", "phase only", "--only", "random real images")
    said = "--study claims --ipc 1 --seeds 2"
    flags = ("ablate.py", *said.split(), *chosen)
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert here(*flags, "--output", str(whole), "--work", "whole", settings=SMALL)[0] == 0
    # A clock that ticks a second whenever it is looked at: what is stopped does not depend on the machine.
    monkeypatch.setattr("ncfm_engine.stop.time", SimpleNamespace(monotonic=itertools.count().__next__))
    arguments = ("--output", str(parts), "--work", "parts", "--time-budget", "4s")
    stages = set()
    for _ in range(60):
        status, output, _ = here(*flags, *arguments, settings=SMALL)
        if status != 75:
            break
        stages |= set(re.findall(r"order \((\w+)", output))
    assert status == 0
    assert stages == {"before", "distil", "evaluate"}
    assert not list((tmp_path / "parts").glob("training-*"))
    found = [findings(path) for path in (whole, parts)]
    for name, row in found[0].items():
        again = found[1][name]
        assert values(row) == values(again)
        assert len(values(row)) == 2
        assert [run.get("curve") for run in row["runs"]] == [run.get("curve") for run in again["runs"]]
    names = {"the preset", "alpha 0 (phase only)", "random real images"}
    assert set(found[0]) == set(found[1]) == names


def test_more_seeds_add_runs_and_keep_those_that_are_there(here, tmp_path):
    flags = ("ablate.py", "--ipc", "1", "--only", "the preset", "--output", "rows.json")
    assert here(*flags, "--seeds", "1", settings=SMALL)[0] == 0
    first = findings(tmp_path / "rows.json")["the preset"]["runs"]
    assert here(*flags, "--seeds", "2", settings=SMALL)[0] == 0
    runs = findings(tmp_path / "rows.json")["the preset"]["runs"]
    assert runs[:1] == first
    assert len(runs) == 2
    assert runs[0]["curve"] != runs[1]["curve"]


def test_findings_of_other_settings_are_not_mixed(here, tmp_path):
    said = "--ipc 1 --seeds 1 --output rows.json --only"
    flags = ("ablate.py", *said.split(), "random real images")
    assert here(*flags, settings=SMALL)[0] == 0
    before = (tmp_path / "rows.json").read_bytes()
    status, _, error = here(*flags, settings=[*SMALL, "distill.alpha=0.4"])
    assert status == 2
    assert "settings.distill.alpha is 0.5 there and 0.4 here" in " ".join(error.split())
    assert (tmp_path / "rows.json").read_bytes() == before
    for other in (b"mine", b"[1]", b"\xff"):
        (tmp_path / "rows.json").write_bytes(other)
        status, _, error = here(*flags, settings=SMALL)
        assert (status, (tmp_path / "rows.json").read_bytes()) == (2, other)
        assert "does not hold the findings of a study" in " ".join(error.split())


def test_labels_and_rounding_are_measured_on_the_images_that_are_there(here, tmp_path):
    flags = ("ablate.py", "--ipc", "1", "--seeds", "1", "--output", "rows.json", "--work", "work")
    chosen = ("--only", "the preset", "--only", "before rounding", "--only", "soft labels, temperature 4")
    assert here(*flags, *chosen, settings=SMALL)[0] == 0
    rows = findings(tmp_path / "rows.json")
    assert len(rows) == 4
    assert len(list((tmp_path / "work").iterdir())) == 1  # distilled once
    seconds = [rows[name]["runs"][0]["seconds"] for name in rows if "random" not in name]
    assert max(seconds) - min(seconds) < 0.15  # of one distillation, and of loading it, rounded to tenths


@pytest.fixture
def laboratory(digits, tmp_path, monkeypatch):
    """Of a tiny recipe with changes; `seen` has how each network was trained, on what, in how many steps;
    `loaders` what gave these, `paths` where its progress lies.
    """
    seen, loaders, paths = [], [], []

    def train(loader, epochs, source, config, network, seed, checks, **options):
        labels = "soft" if loader.targets.is_floating_point() else "hard"
        seen.append((labels, loader.images.dtype, len(loader.images), epochs * len(loader)))
        loaders.append(loader)
        paths.append(options["path"])
        name = options["path"].stem.removeprefix("training-")
        with pytest.raises(Timeout):  # nobody else does the same at the same time
            FileLock(tmp_path / "cache" / "locks" / name).acquire(timeout=0)
        assert loader.seed == seed
        return 50.0, 50.0

    monkeypatch.setattr(runs, "train_and_test", train)

    def make(ipc=4, **changes):
        settings = dict(setting.split("=") for setting in SMALL) | {"evaluate.batch_size": "10"}
        options = {"cache": tmp_path / "cache", "device": "cpu"}
        plan = make_plan(dataset="digits", ipc=ipc, changes=settings | changes, **options)
        return runs.Laboratory(plan, digits, tmp_path / "work", StopRequest(), silent)

    make.seen, make.loaders, make.paths = seen, loaders, paths
    return make


def test_every_variant_is_trained_on_its_own_images_in_as_many_steps(laboratory):
    made = laboratory()
    for variant in (
        Variant(),
        Variant(images="exact"),
        Variant(images="random"),
        Variant(prefix=1),
        Variant({"ipc": "2"}),
        Variant({"evaluate.labels": "soft"}),
        Variant({"evaluate.labels": "soft"}, images="random"),
    ):
        made.run(variant, 0)
    steps = 3 * 4  # epochs over four batches of ten
    assert laboratory.seen == [
        ("hard", torch.uint8, 40, steps),
        ("hard", torch.float32, 40, steps),
        ("hard", torch.uint8, 40, steps),
        ("hard", torch.uint8, 10, steps),
        ("hard", torch.uint8, 20, steps),
        ("soft", torch.uint8, 40, steps),
        ("soft", torch.uint8, 40, steps),
    ]
    stored, exact, random, first = (loader.images for loader in laboratory.loaders[:4])
    assert 0 < (exact - stored).abs().max() <= 0.501
    assert torch.equal(first, stored[:10])
    assert not torch.equal(random, stored)


def test_images_are_decoded_normalised_and_labelled_as_those_of_an_artifact(laboratory, digits):
    changes = {"distill.factor": "2", "label.temperature": "0.01", "evaluate.augment": "flip"}
    made = laboratory(**changes, **{"evaluate.labels": "soft"})
    made.run(Variant(), 1)
    made.run(Variant(images="random"), 1)
    assert [steps for *_, steps in laboratory.seen] == [3 * 4 * 4] * 2  # every image has four views
    for factor, loader in zip((2, 1), laboratory.loaders, strict=True):
        assert (loader.augment, loader.seed) == ("flip", seed_at(0, 1))
        loader.augment, loader.shuffle = None, False
        images, targets = next(iter(loader))
        views = decode(loader.images.float() / 255, factor).flatten(0, 1)[:10]
        assert torch.allclose(images, (views - digits.mean[0]) / digits.std[0], atol=1e-5)
        assert targets.max(1).values.mean() > 0.5  # at temperature 1 the teacher is not sure at all


def test_no_training_goes_on_with_the_progress_of_another(laboratory):
    constant = {"distill.schedule": "constant"}  # of which more steps have the same beginning
    made = laboratory(**constant)
    settings = {"distill.alpha": "0.3", "distill.iterations": "3", "evaluate.learning_rate": "0.1"}
    settings |= {"label.temperature": "3", "network.width": "4"}
    variants = [Variant({name: value}, images="random") for name, value in settings.items()]
    variants += [Variant(images="random"), Variant(images="random", prefix=1), Variant()]
    for seed in (0, 1):
        for variant in variants:
            made.run(variant, seed)
    laboratory(ipc=8, **constant).run(Variant({"ipc": "4"}, images="random"), 0)  # in more steps
    assert len(set(laboratory.paths)) == 2 * len(variants) + 1
    made.run(variants[0], 0)
    assert laboratory.paths[-1] == laboratory.paths[0]


def test_what_was_distilled_with_other_networks_is_not_used(laboratory, tmp_path):
    first, second = (laboratory(seed=seed).run(Variant(), 0)["curve"] for seed in ("0", "1"))
    assert first != second
    assert len(list((tmp_path / "work").iterdir())) == 2


@pytest.mark.filterwarnings("ignore:distil, waiting")
def test_two_studies_do_not_distil_the_same_set_at_once(laboratory, tmp_path):
    first, second = laboratory(), laboratory()
    expected = first.run(Variant(), 0)["curve"]
    [folder] = (tmp_path / "work").iterdir()
    found = []
    other = threading.Thread(target=lambda: found.append(second.run(Variant(), 0)["curve"]))
    with FileLock(folder / "lock"):
        other.start()
        other.join(1)
        assert not found
    other.join()
    assert found == [expected]


def test_a_study_that_waits_for_another_hears_a_stop(laboratory, tmp_path):
    made = laboratory()
    made.run(Variant(), 0)
    [folder] = (tmp_path / "work").iterdir()
    training = laboratory.paths[0].stem.removeprefix("training-")
    for lock in (folder / "lock", tmp_path / "cache" / "locks" / training):
        made.stop = StopAfter(1)  # not before the run
        with FileLock(lock), pytest.raises(Stopped, match="waiting for another process"):
            made.run(Variant(), 0)
    assert made.stop.asked == 2


def test_a_nested_study_compares_prefixes_with_sets_of_their_own(here, tmp_path):
    said = "--study nested --ipc 2 --seeds 1 --output rows.json --work w"
    flags = ("ablate.py", *said.split())
    assert here(*flags, settings=SMALL)[0] == 0
    rows = findings(tmp_path / "rows.json")
    assert list(rows) == [
        f"{k}: {kind}"
        for k in (1, 2)
        for kind in ("alone", "first of 2, nested", "first of 2", "random real images")
    ]
    curves = {name: row["runs"][0].get("curve") for name, row in rows.items()}
    assert curves["2: alone"] == curves["2: first of 2"] == curves["1: first of 2"]
    assert values(rows["2: alone"]) == values(rows["2: first of 2"])
    names = ("1: alone", "2: alone", "2: first of 2, nested")
    assert len({str(curves[name]) for name in names}) == 3
