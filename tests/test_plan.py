"""The plan: flags resolved in order, occupied folders left alone, memory counted."""

import dataclasses
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from distilled_data import OutputError, UnknownNameError, UsageError
from distilled_data.format import ARTIFACT_FILE, MANIFEST_FILE, PARQUET_FILE
from ncfm_engine import plan as plans
from ncfm_engine.checkpoint import previous_of, save_checkpoint
from ncfm_engine.costs import COSTS_FILE
from ncfm_engine.distill import CHECKPOINT_FILE, METRICS_FILE
from ncfm_engine.plan import (
    COMPILE_FROM,
    RESULTS_FILE,
    Plan,
    check_output,
    clear_output,
    compiles,
    describe,
    describe_evaluation,
    estimate_seconds,
    footprint,
    identity,
    layout_of,
    make_plan,
    remove_leftovers,
    run_folder_of,
)
from ncfm_engine.ranks import Ranks


@pytest.fixture
def plan(tmp_path) -> Plan:
    return make_plan(dataset="digits", output=tmp_path / "out", cache=tmp_path / "cache", device="cpu")


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("something")
    return path


def test_a_flag_beats_set_and_set_beats_the_preset_and_the_preset_the_default(tmp_path):
    options = {"dataset": "digits", "cache": tmp_path, "device": "cpu"}
    assert make_plan(**options).recipe.distill.factor == 1  # default 2
    assert make_plan(**options, changes={"distill.iterations": "7"}).recipe.distill.iterations == 7
    with pytest.warns(UserWarning, match="--iterations 9 takes the place of --set distill.iterations=7"):
        both = make_plan(**options, changes={"distill.iterations": "7", "ipc": "3"}, iterations=9, ipc=3)
    assert (both.recipe.distill.iterations, both.recipe.ipc) == (9, 3)


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("folder:some/photos", "photos"),
        ("hf:org/flowers:small:train", "flowers"),
        ("hf:C:/data/flowers:small", "flowers"),
        ("wds:https://host/some/shards/{0..9}.tar", "shards"),
        ("wds:train.tar", "wds"),
        ("npz:some/blood.v2.npz", "blood"),
        ("hf:org/flowers.v2", "flowers.v2"),
        ("wds:some/shards.v2/a.tar", "shards.v2"),
    ],
)
def test_the_output_is_named_after_dataset_and_ipc(tmp_path, dataset, name):
    named = make_plan(dataset=dataset, ipc=5, cache=tmp_path, device="cpu")
    assert named.output == Path(f"distilled/{name}-ipc5")
    assert named.preset == "default"


def test_the_name_of_a_folder_may_have_dots(tmp_path):
    for name in ("photos.v1", "photos.v2", ".photos"):
        (tmp_path / name).mkdir()
    options = {"ipc": 5, "cache": tmp_path, "device": "cpu"}
    plans = [make_plan(dataset=f"folder:{path}", **options) for path in sorted(tmp_path.iterdir())]
    assert [plan.output.name for plan in plans] == ["photos-ipc5", "photos.v1-ipc5", "photos.v2-ipc5"]


def test_a_preset_says_the_size_of_images_that_are_not_prepared_yet(tmp_path):
    given = [("folder:a", {}), ("folder:a", {"size": 32}), ("store:a", {})]
    options = {"preset": "tinyimagenet-ipc1", "cache": tmp_path, "device": "cpu"}
    plans = [make_plan(dataset=dataset, reading=reading, **options) for dataset, reading in given]
    assert [plan.reading.get("size") for plan in plans] == [64, 32, None]


def test_each_process_of_torchrun_has_its_own_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(UsageError, match="--device cuda:99 cannot be used here"):
        make_plan(dataset="digits", cache=tmp_path, device="cuda")
    assert make_plan(dataset="digits", cache=tmp_path, device="cpu").device == "cpu"


def test_the_run_folder_lies_beside_the_output_wherever_that_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder_of(Path(".")) == tmp_path.parent / f"{tmp_path.name}.run"
    assert run_folder_of(Path("a/b/")) == tmp_path / "a" / "b.run"


def test_neither_dataset_nor_preset_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--dataset or a --preset"):
        make_plan(cache=tmp_path)
    with pytest.raises(UsageError, match="folder:PATH"):
        make_plan(preset="tinyimagenet-ipc10", cache=tmp_path)
    with pytest.raises(UnknownNameError, match="Did you mean 'cpu'"):
        make_plan(preset="cpuu", cache=tmp_path)


def test_an_empty_or_missing_output_is_free(plan):
    check_output(plan)
    plan.output.mkdir()
    put(plan.run_folder / COSTS_FILE)  # nothing to go on from
    check_output(plan)


@pytest.mark.parametrize("name", [ARTIFACT_FILE, RESULTS_FILE, "evaluation-0-1.safetensors"])
def test_a_set_needs_overwrite_and_resume_is_not_enough(plan, name):
    path = put((plan.output if name == ARTIFACT_FILE else plan.run_folder) / name)
    for occupied in (plan, dataclasses.replace(plan, resume=True)):
        with pytest.raises(OutputError, match=f"{path}.*, or replace it with --overwrite"):
            check_output(occupied)
    put(plan.output / "thesis.txt")
    with pytest.raises(OutputError, match=r"beside it is not empty: found .* and 1 more\. Choose"):
        check_output(plan)
    check_output(dataclasses.replace(plan, overwrite=True))


@pytest.mark.parametrize("name", ["README.md", "deep/er/thesis.txt", METRICS_FILE])
def test_a_folder_that_holds_no_set_is_not_overwritten(plan, name):
    path = put(plan.output / name)
    for occupied in (plan, dataclasses.replace(plan, overwrite=True)):
        with pytest.raises(OutputError, match=rf"{path}\. Choose another --output\.$"):
            check_output(occupied)


@pytest.mark.parametrize("of", [lambda path: path, previous_of], ids=["current", "previous"])
def test_a_run_with_a_checkpoint_may_be_resumed_and_says_so(plan, of):
    put(of(plan.run_folder / CHECKPOINT_FILE))
    with pytest.raises(OutputError, match="--resume"):
        check_output(plan)
    check_output(dataclasses.replace(plan, resume=True))
    check_output(dataclasses.replace(plan, overwrite=True))


def test_a_run_killed_before_its_first_checkpoint_may_be_resumed_too(plan):
    put(plan.run_folder / METRICS_FILE)
    put(plan.run_folder / f".{CHECKPOINT_FILE}.x1y2.tmp")
    check_output(dataclasses.replace(plan, resume=True))
    put(plan.output / "README.md")
    with pytest.raises(OutputError, match=r"README\.md"):
        check_output(dataclasses.replace(plan, resume=True))


def test_an_output_that_is_a_file_is_refused_even_with_overwrite(plan):
    put(plan.output)
    with pytest.raises(OutputError, match="is a file"):
        check_output(dataclasses.replace(plan, overwrite=True))


def test_an_output_that_is_a_link_to_nothing_is_refused_before_the_run(plan):
    plan.output.symlink_to("nowhere")
    with pytest.raises(OutputError, match="is a link to nothing"):
        check_output(plan)


def test_clearing_removes_what_is_derived_and_keeps_the_rest(plan):
    derived = [put(plan.output / name) for name in (MANIFEST_FILE, PARQUET_FILE)]
    derived += [put(plan.run_folder / name) for name in (RESULTS_FILE, "evaluation-0-1.safetensors")]
    kept = [put(plan.output / name) for name in ("README.md", "notes.txt")]
    clear_output(plan)
    assert not any(path.exists() for path in derived)
    assert all(path.exists() for path in kept)


def test_what_a_killed_process_left_is_removed_and_nothing_else(plan):
    leftovers = [put(folder / f".{CHECKPOINT_FILE}.x1y2.tmp") for folder in (plan.output, plan.run_folder)]
    kept = [put(plan.output / "notes.tmp"), put(plan.run_folder / CHECKPOINT_FILE)]
    remove_leftovers(plan)
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in kept)


def test_the_identity_changes_with_what_decides_the_images_only(plan, digits):
    def of(changes: dict, source=digits) -> dict:
        return identity(dataclasses.replace(plan, recipe=plan.recipe.replace(changes)), source)

    same = of({})
    for change in ({"distill.alpha": 0.3}, {"seed": 1}, {"ipc": 3}, {"pretrain.epochs": 1}):
        assert of(change) != same
    for change in (
        {"evaluate.epochs": 1},
        {"label.temperature": 2.0},
        {"distill.checkpoint_every": 1},
        {"pretrain.at_once": 2},
    ):
        assert of(change) == same
    rounded = {"distill.schedule": "constant", "distill.quantised": 0.1}
    assert of(rounded | {"distill.iterations": 7}) != of(rounded)  # its last steps are others
    constant = {"distill.schedule": "constant"}
    assert of(constant) == of(constant | {"distill.iterations": COMPILE_FROM - 1})
    cosine = {"distill.schedule": "cosine"}
    assert of(cosine) != of(cosine | {"distill.iterations": COMPILE_FROM - 1})
    assert of({}, dataclasses.replace(digits, fingerprint="other")) != same
    assert identity(dataclasses.replace(plan, device="cuda"), digits) != same
    smallest, noted = int(digits.train.counts.min()), "real images per class"
    assert noted not in of({"distill.real_batch": smallest})  # nor in checkpoints of when no class gave more
    assert of({"distill.real_batch": smallest + 1})[noted] == smallest + 1
    assert "compiled" not in same  # nor in checkpoints of before it was noted
    assert identity(dataclasses.replace(plan, compile="on"), digits) == same | {"compiled": True}


def test_a_run_begun_with_networks_of_another_schedule_is_another_run(plan, digits):
    few = dataclasses.replace(plan, recipe=plan.recipe.replace({"pretrain.epochs": 2}))
    many = dataclasses.replace(plan, recipe=plan.recipe.replace({"pretrain.epochs": 30}))
    assert identity(few, digits)["milestones"] == "in steps"
    assert "milestones" not in identity(many, digits)


def test_a_memory_budget_cuts_the_classes_and_one_that_is_too_small_is_refused(plan, digits):
    assert layout_of(plan, digits) == layout_of(dataclasses.replace(plan, memory=2**40), digits)
    assert layout_of(dataclasses.replace(plan, memory=8 * 2**20), digits).classes < 10
    with pytest.raises(
        UsageError, match=r"--memory 1KiB is below the minimum of \d\.\dMiB: bank of real features"
    ):
        layout_of(dataclasses.replace(plan, memory=1024), digits)


def test_a_bank_that_the_machine_has_no_memory_for_is_told_of_before_anything_is_trained(
    plan, digits, monkeypatch, recwarn
):
    bank = footprint(plan, digits).fixed(layout_of(plan, digits))["bank of real features"]
    monkeypatch.setattr(plans, "MEMORY", bank)
    layout_of(plan, digits)
    assert not recwarn
    monkeypatch.setattr(plans, "MEMORY", bank - 1)
    layout_of(
        dataclasses.replace(plan, recipe=plan.recipe.replace({"distill.real_features": "fresh"})), digits
    )
    assert not recwarn
    with pytest.warns(UserWarning, match=r"the bank of real features takes .*: 10 classes x \d+ real images"):
        describe(plan, digits)


def test_the_probe_takes_batches_as_training_has_them_with_gradients_and_without(plan, digits):
    small = plan.recipe.replace({"pretrain.batch_size": 3, "evaluate.precision": "bfloat16"})
    seen = set()

    def note(_, inputs):
        if len(inputs[0]) > 1:  # what is built is tried with one
            seen.add((len(inputs[0]), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    with register_module_forward_pre_hook(note):
        estimate_seconds(small, digits, "cpu")
    assert seen == set(itertools.product([3], [False, True], [False, True]))  # distilling in float32


def test_the_time_is_that_of_the_fastest_pass_for_every_image(plan, digits, monkeypatch):
    clock = iter([0, 9, 10, 16, 20, 29, 100, 190, 200, 230, 300, 360])  # 2 s and 10 s for each of 3 images
    monkeypatch.setattr("ncfm_engine.plan.time", SimpleNamespace(perf_counter=clock.__next__))
    changes = {"ipc": 2, "pretrain.batch_size": 3, "pretrain.networks": 2, "pretrain.epochs": 7}
    changes |= {"distill.iterations": 5, "distill.real_batch": 4, "distill.real_features": "fresh"}
    changes |= {"distill.discrepancy": "dm", "distill.calibration": 0.0}
    seconds = estimate_seconds(plan.recipe.replace(changes), digits, "cpu")
    assert seconds["pretraining"] == 2 * 7 * 1438 * 10
    assert seconds["distilling"] == 5 * 10 * (4 * 2 + 2 * 10)


def test_a_plan_is_told_in_words_with_their_units(plan, digits, monkeypatch):
    times = {"pretraining": 59.4, "two": 59.6, "three": 3600, "four": 7384}
    monkeypatch.setattr("ncfm_engine.plan.estimate_seconds", lambda *_: times)
    monkeypatch.setattr("ncfm_engine.plan.operations", lambda *_: {"one": 1.25e12, "two": 3e15})
    changes = {"ipc": 3, "distill.factor": 2, "distill.real_batch": 64}
    told = describe(dataclasses.replace(plan, recipe=plan.recipe.replace(changes)), digits)
    for line in (
        "dataset      digits: 1438 images of 1x8x8, 10 classes, tested on 359",
        "images       uint8 [3, 10, 1, 8, 8], 12 views per class, 1920 bytes",
        "step         10 classes x (64 real + 12 synthetic images), 256 frequencies, 10 classes and 640 real",
        "steps        400",
    ):
        assert line in told
    assert re.search(r"\nmemory       about \d\d MiB on cpu, besides torch itself\n", told)
    assert "\noperations   one 1.25 TFLOP, two 3e+03 TFLOP\n" in told
    assert "about pretraining 59s, two 1m 00s, three 1h 00m, four 2h 03m\n" in told
    monkeypatch.setattr("ncfm_engine.plan.count_cached", lambda *_, **__: plan.recipe.pretrain.networks - 1)
    times["pretraining"] = 60.0 * plan.recipe.pretrain.networks
    assert "about pretraining 1m 00s, two " in describe(plan, digits)
    plain = dataclasses.replace(plan, recipe=plan.recipe.replace({"distill.discrepancy": "dm"}))
    assert "synthetic images), 0 frequencies, " in describe(plain, digits)


def test_an_evaluation_is_told_with_the_networks_that_label_unless_labels_are_hard(
    plan, digits, tmp_path, monkeypatch
):
    times = {16: {"pretraining": 8e9, "evaluating": 59.4}, 32: {"pretraining": 480.0, "evaluating": 8e9}}
    monkeypatch.setattr("ncfm_engine.plan.estimate_seconds", lambda recipe, *_: times[recipe.network.width])
    monkeypatch.setattr(
        "ncfm_engine.plan.count_cached", lambda config, network, *_, **__: network.width // 32
    )
    changes = {"ipc": 3, "distill.factor": 2, "network.width": 16, "evaluate.repeats": 4}
    recipe = plan.recipe.replace(changes | {"evaluate.labels": ("hard", "soft")})
    teacher = plan.recipe.replace({"pretrain.networks": 4, "pretrain.epochs": 7})
    told = describe_evaluation(recipe, digits, teacher, "cpu", tmp_path).splitlines()
    epochs = recipe.evaluate.epochs
    for line in (
        f"distilled    8 networks, hard and soft labels, {epochs} epochs of 120 images",
        "random       as many, in as many steps, of 30 images",
        "teacher      4 networks, 7 epochs; 1 in the cache",
        "time         about pretraining 6m 00s, evaluating 59s",
    ):
        assert line in told
    hard = recipe.replace({"evaluate.labels": ("hard",)})
    assert describe_evaluation(hard, digits, teacher, "cpu", tmp_path).endswith("about evaluating 59s")


def test_the_memory_is_that_of_the_networks_kept_and_the_classes_of_one_process(plan, digits):
    recipe = plan.recipe.replace(
        {"pretrain.networks": 3, "pretrain.snapshots": 1}
    )  # and first and last weights
    counts = footprint(dataclasses.replace(plan, recipe=recipe), digits, Ranks(2, 3))
    assert (counts.kept_networks, counts.num_classes) == (9, 4)


def test_long_runs_are_compiled_and_short_ones_are_not(plan, monkeypatch):
    from ncfm_engine import plan as module

    long = dataclasses.replace(plan, recipe=plan.recipe.replace({"distill.iterations": COMPILE_FROM}))
    monkeypatch.setattr(module, "which", lambda name: "/usr/bin/" + name)
    assert [compiles(p) for p in (plan, long)] == [False, True]
    assert [compiles(dataclasses.replace(p, compile="on")) for p in (plan, long)] == [True, True]
    assert [compiles(dataclasses.replace(p, compile="off")) for p in (plan, long)] == [False, False]
    there = dataclasses.replace(long, device="cuda")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(module, "find_spec", lambda name: object())  # Triton needs one for C
    for compiler, expected in (("g++", [True, False]), ("clang++", [True, False]), ("gcc", [False, True])):
        monkeypatch.setattr(module, "which", lambda name, only=compiler: only if name == only else None)
        assert [compiles(p) for p in (long, there)] == expected
    monkeypatch.setenv("CC", "cc")
    assert compiles(there)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert not compiles(there)
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setattr(module.sys, "platform", "darwin")
    assert [compiles(dataclasses.replace(there, compile=how)) for how in ("auto", "on")] == [False, True]


@pytest.mark.parametrize("compiled", [True, False])
def test_a_run_that_goes_on_is_compiled_if_it_was_begun_so(plan, monkeypatch, tmp_path, compiled):
    from ncfm_engine import plan as module

    monkeypatch.setattr(module, "which", lambda name: "/usr/bin/" + name)
    steps = "10" if compiled else "10000"
    plan = dataclasses.replace(
        plan, output=tmp_path / "out", recipe=plan.recipe.replace({"distill.iterations": steps})
    )
    assert compiles(plan) != compiled
    begun = {"compiled": True} if compiled else {}
    save_checkpoint(plan.run_folder / "checkpoint.safetensors", {}, identity=begun, progress={})
    assert compiles(dataclasses.replace(plan, resume=True)) == compiled
    assert compiles(plan) != compiled
    monkeypatch.setattr(module, "which", lambda name: None)
    assert not compiles(dataclasses.replace(plan, resume=True))
