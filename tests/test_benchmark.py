"""The benchmark in small: both sides of every ratio, and a baseline that computes the same step."""

import dataclasses
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from children import PRELOADED, context

from distilled_data import DistilledDataError, UsageError
from ncfm_engine.distill import distill

ROOT = Path(__file__).parents[1]
SHAPES = "--classes 3 --size 8 --real-images 16 --frequencies 16 --width 8 --threads 1 --device cpu"
TURNS = "--rounds 2 --turn 0.02s"


@pytest.fixture(scope="module")
def tool():
    """The command as a module; its parts are `tools.benchmark` from then on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        module = importlib.import_module("benchmark_engine")
        # One server forks for all tests: not one that has imported what the benchmark needs alone.
        context.set_forkserver_preload(PRELOADED)
        yield module


def part(name: str):
    return importlib.import_module(f"tools.benchmark.{name}")


def arguments(tool, words: str = ""):
    return tool.parser().parse_args(f"{SHAPES} {TURNS} {words}".split())


@pytest.fixture(scope="module")
def output(tool, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "small.json"
    variant = "--variant bank=distill.real_features=bank,distill.bank_size=2,distill.bank_refresh=3"
    more = "--ipc 1 2 --growth classes=2,4 ranks --profile --pretrain 1x1"
    tool.main(arguments(tool, f"{variant} {more} --output {path}"))
    return path


@pytest.fixture(scope="module")
def content(output) -> dict:
    return json.loads(output.read_text())


def test_every_contender_has_the_raw_time_of_every_round_at_every_ipc(content):
    rows = {(row["ipc"], row["contender"]): row for row in content["comparison"]}
    assert set(rows) == {(ipc, name) for ipc in (1, 2) for name in ("engine", "loop", "bank")}
    for row in rows.values():
        assert len(row["seconds"]) == 2
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["images_per_step"] == 3 * (16 + 2 * row["ipc"] * 4)
        assert row["images_per_second"] == pytest.approx(row["images_per_step"] / row["median"])


def test_the_classes_of_a_process_give_as_many_real_images_as_the_largest_of_all(tool):
    config = tool.setup_of(arguments(tool)).recipe.distill
    count, counts = part("engine").images_per_step, torch.tensor([2, 2, 20])
    parts = [count(config, 1, counts, classes) for classes in (slice(0, 2), slice(2, 3))]
    assert parts == [2 * (16 + 2 * 4), 16 + 2 * 4]
    assert count(config, 1, counts) == sum(parts)


def test_every_ratio_has_both_its_sides(content):
    medians = {(row["ipc"], row["contender"]): row["median"] for row in content["comparison"]}
    assert len(content["ratios"]) == 4
    for row in content["ratios"]:
        slow, fast = row["ratio"].split(" / ")
        assert (row["numerator"], row["denominator"]) == (
            medians[row["ipc"], slow],
            medians[row["ipc"], fast],
        )
        assert row["value"] == row["numerator"] / row["denominator"]


def test_the_table_beside_the_json_has_a_row_for_each(output, content):
    lines = output.with_suffix(".md").read_text().splitlines()
    table = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if "|" in line}
    for row in content["ratios"]:
        sides = (f"{row['numerator']:.4g}", f"{row['denominator']:.4g}", f"{row['value']:.2f}")
        assert (str(row["ipc"]), row["ratio"], *sides) in table


def test_a_result_says_where_and_how_it_was_measured_and_tells_no_path(content, output):
    assert content["hardware"]["threads"] == 1
    assert content["versions"]["torch"]
    assert content["flags"]["frequencies"] == content["recipe"]["distill"]["frequencies"] == 16
    assert str(output.parent) not in json.dumps(content)


def test_a_report_tells_the_settings_whichever_flag_gave_them(tool):
    flags = arguments(tool, "--set distill.frequencies=8 --set distill.real_batch=5 --set network.width=4")
    content = tool.description(flags, tool.setup_of(flags))
    text = (
        "3x8x8, 5 real images per class and step, T = 8, ConvNet of width 4. Median (min to max) of 2 rounds."
    )
    assert text in part("report").markdown(content)


def test_a_bank_is_timed_over_whole_refreshes(content):
    assert all(
        row["iterations_per_round"] % 3 == 0 for row in content["comparison"] if row["contender"] == "bank"
    )


def test_growth_has_its_points_and_a_plot(content, output):
    points = [(row["axis"], row["value"]) for row in content["growth"]]
    assert points == [("classes", 2), ("classes", 4), ("ranks", 1), ("ranks", 2)]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_growth_has_no_more_ranks_than_there_are_gpus():
    parse = part("growth").parse
    assert parse([], 1)["ranks"] == parse(["ranks"], 1)["ranks"] == (1,)
    assert parse([])["ranks"] == (1, 2)
    with pytest.raises(UsageError, match="--growth ranks=1,4: there are 2 GPUs"):
        parse(["ranks=1,4"], 2)


def test_time_in_proportion_to_the_pixels_has_exponent_one(tool):
    rows = [{"axis": "size", "value": side, "median": side**2} for side in (32, 64)]
    rows += [{"axis": "ipc", "value": ipc, "median": 3.0} for ipc in (1, 10)]
    assert part("growth").exponents(rows) == [None, 1.0, None, 0.0]


def test_the_profile_shares_out_all_the_time_and_counts_the_operations(content):
    found = content["profile"]
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"]["convolution"] > 0
    forward = 2 * 9 * 3 * 8 * 8 * 8  # of the only convolution of one image, two per multiply-add
    real, synthetic = 3 * 16 * forward, 3 * 4 * 2 * 2 * forward  # two networks, forward and backward
    assert real + synthetic < found["operations"] < 2 * (real + synthetic)
    assert list(found["shares"].values()) == sorted(found["shares"].values(), reverse=True)
    assert set(found["rates"]) == {"float32", "bfloat16"}
    for name, rate in found["rates"].items():
        assert found["limit_seconds"][name] * rate == pytest.approx(found["operations"])
        assert found["fraction"][name] * found["seconds"] == pytest.approx(found["limit_seconds"][name])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::addmm", "matrix multiplication"),
        ("aten::add_", "elementwise and reductions"),
        ("aten::native_group_norm", "normalisation"),
        ("aten::normal_", "random and copy"),
        ("triton_per_fused_native_group_norm_3", "elementwise (fused)"),
        ("something new", "other"),
    ],
)
def test_an_operation_has_a_kind_and_what_a_step_of_the_optimiser_does_is_the_optimisers(name, kind):
    kind_of = part("arithmetic").kind_of
    outer = SimpleNamespace(name="Optimizer.step#SGD.step", cpu_parent=None)
    between = SimpleNamespace(name="aten::add", cpu_parent=outer)
    assert kind_of(SimpleNamespace(name=name, cpu_parent=None)) == kind
    assert kind_of(SimpleNamespace(name=name, cpu_parent=between)) == "optimiser"


def test_pretraining_is_timed(content):
    row = content["pretrain"]
    assert row["network_epochs_per_second"] == pytest.approx(1 / row["seconds"])


def test_engine_and_loop_compute_the_same_step(content):
    assert set(content["agreement"]) == {"discrepancy", "cross-entropy", "image gradients", "psi gradients"}
    assert all(content["agreement"][name] < 1e-3 for name in ("discrepancy", "cross-entropy"))


def test_a_loop_with_another_alpha_does_not_agree(tool):
    setup = tool.setup_of(arguments(tool, "--ipc 1"))
    other = dataclasses.replace(setup.recipe.distill, alpha=0.6)
    with pytest.raises(DistilledDataError, match="the discrepancy of a class differ"):
        part("loop").agreement(setup, other)


def test_a_report_tells_how_many_real_images_there_are_where_more_are_asked_for(tool):
    flags = arguments(tool, "--dataset digits --set distill.real_batch=500")
    content = tool.description(flags, tool.setup_of(flags))
    assert content["shape"] == "digits, 146 real images per class and step"


def test_of_a_dataset_at_a_place_a_report_tells_its_name_alone(tool, tmp_path):
    arrays = {"images": torch.arange(4 * 192).view(4, 8, 8, 3).byte().numpy(), "labels": np.arange(4) % 2}
    np.savez(tmp_path / "photos.npz", **arrays)
    flags = arguments(tool, f"--dataset npz:{tmp_path}/photos.npz")
    content = tool.description(flags, tool.setup_of(flags))
    assert str(tmp_path) not in json.dumps(content)
    assert content["shape"].startswith("photos, ")
    assert content["flags"]["dataset"] == "npz:photos.npz"


@pytest.mark.parametrize("real", [5, 40])
def test_random_images_are_as_many_as_a_step_is_said_to_take(tool, real):
    setup = tool.setup_of(arguments(tool, f"--set distill.real_batch={real}"))
    assert part("engine").Engine(setup).game.real.per_class == real


def test_what_is_timed_are_the_steps_of_a_run(tool):
    more = "--set distill.iterations=3 --set distill.schedule=cosine --set distill.sampler_steps=2"
    setup = tool.setup_of(arguments(tool, f"--ipc 1 {more}"))
    engine = part("engine").Engine(setup)
    engine.run(3)
    made = distill(setup.recipe.distill, *setup.open(), ipc=1, seed=setup.recipe.seed, device="cpu")
    assert torch.equal(engine.images, made.images)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--growth colours", "--growth colours: expected AXIS"),
        ("--pretrain 20", "--pretrain 20: expected MxE"),
        ("--variant fast", "--variant fast: expected NAME=FIELD=VALUE"),
        ("--variant fast=step.speed=2", "step.speed=2: of the step, only"),
    ],
)
def test_a_wrong_flag_is_refused_before_anything_is_measured(tool, words, message, monkeypatch):
    monkeypatch.setattr(tool, "in_process", None)
    monkeypatch.setattr(tool, "measure", None)
    with pytest.raises(UsageError, match=message):
        tool.main(arguments(tool, words))


def test_a_folder_that_is_no_checkout_of_the_reference_is_refused(tool, tmp_path):
    with pytest.raises(UsageError, match=r"found no condenser/Condenser\.py"):
        tool.main(arguments(tool, f"--reference {tmp_path}"))
