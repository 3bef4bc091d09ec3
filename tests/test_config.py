"""Recipes and presets: senseless values refused, text read by type, one row per published result."""

import dataclasses
import json
from pathlib import Path

import pytest

from distilled_data import UnknownNameError, UsageError
from distilled_data.format import ARTIFACT_FILE, read_artifact
from ncfm_engine.config import (
    DistillConfig,
    EvaluateConfig,
    LabelConfig,
    NetworkConfig,
    PretrainConfig,
    Recipe,
)
from ncfm_engine.presets import PRESETS, Preset, find_preset

CONFIGS = (NetworkConfig, PretrainConfig, DistillConfig, LabelConfig, EvaluateConfig, Recipe)
NAN, INF = float("nan"), float("inf")
SUBSETS = ("nette", "woof", "fruit", "meow", "squawk", "yellow")


def test_a_step_keeps_its_real_features_only_for_turns_that_are_played():
    fresh = {"real_features": "fresh", "sampler_steps": 3}
    played = {name: DistillConfig(discrepancy=name, **fresh) for name in ("ncfd", "cfd", "dm")}
    kept = {name: (config.turns, config.kept_entries) for name, config in played.items()}
    assert kept == {"ncfd": (3, 1), "cfd": (1, 0), "dm": (1, 0)}
    assert DistillConfig(real_features="fresh").kept_entries == 0


def test_the_settings_of_every_published_artifact_can_be_read():
    paths = sorted((Path(__file__).parents[1] / "tools" / "results").rglob(ARTIFACT_FILE))
    assert len(paths) >= 3
    for path in paths:
        recipe = Recipe.from_dict(read_artifact(path).metadata.recipe["settings"])
        assert recipe.distill.discrepancy == "ncfd"


def test_a_whole_number_in_place_of_a_fraction_makes_the_same_recipe():
    ours, same = Recipe().replace({"distill.alpha": 1}), Recipe().replace({"distill.alpha": "1"})
    assert json.dumps(dataclasses.asdict(ours)) == json.dumps(dataclasses.asdict(same))
    assert type(LabelConfig(temperature=2).temperature) is float


@pytest.mark.parametrize(
    ("config", "name", "values"),
    [
        (NetworkConfig, "name", ["resnet19"]),
        (NetworkConfig, "norm", ["instanc"]),
        (NetworkConfig, "activation", ["swosh"]),
        (NetworkConfig, "pooling", ["average"]),
        (NetworkConfig, "width", [0, -1]),
        (NetworkConfig, "depth", [0]),
        (PretrainConfig, "networks", [0]),
        (PretrainConfig, "epochs", [0]),
        (PretrainConfig, "batch_size", [0]),
        (PretrainConfig, "augment", ["colour"]),
        (PretrainConfig, "learning_rate", [-0.1, NAN, INF]),
        (PretrainConfig, "momentum", [-0.1, 1.0]),
        (PretrainConfig, "weight_decay", [-0.1]),
        (PretrainConfig, "cutmix", [-0.1, NAN, 1.5]),
        (PretrainConfig, "snapshots", [-1, 60]),
        (DistillConfig, "iterations", [-1]),
        (DistillConfig, "real_batch", [0]),
        (DistillConfig, "frequencies", [0]),
        (DistillConfig, "alpha", [-0.1, 1.1, NAN]),
        (DistillConfig, "weight", [-1, NAN, INF, -INF, 10**400]),
        (DistillConfig, "calibration", [-1, NAN]),
        (DistillConfig, "factor", [0, -2, 65]),
        (DistillConfig, "initialisation", ["zeros", ""]),
        (DistillConfig, "learning_rate", [-1e-3, NAN]),
        (DistillConfig, "schedule", ["linear", ""]),
        (DistillConfig, "augment", ["colour"]),
        (DistillConfig, "sampler_learning_rate", [-1e-3]),
        (DistillConfig, "sampler_momentum", [-3.0, NAN]),
        (DistillConfig, "checkpoint_every", [0]),
        (DistillConfig, "ema", [-0.1, 1.0, NAN]),
        (DistillConfig, "quantised", [-0.1, 1.1]),
        (DistillConfig, "sampler_steps", [0]),
        (LabelConfig, "temperature", [0, -1, 1e-300, NAN, INF]),
        (EvaluateConfig, "epochs", [0]),
        (EvaluateConfig, "learning_rate", [-1e-3, NAN]),
        (EvaluateConfig, "batch_size", [0]),
        (EvaluateConfig, "augment", ["colour"]),
        (EvaluateConfig, "cutmix", [-0.5, 2.0]),
        (EvaluateConfig, "repeats", [0]),
        (EvaluateConfig, "labels", [("logits",), ("hard", "sotf"), (), ("hard", "hard"), (1,), ([],)]),
        (EvaluateConfig, "full_epochs", [0]),
        (EvaluateConfig, "full_repeats", [-1]),
        (Recipe, "ipc", [0, -1]),
        (Recipe, "validation", [-0.1, 1, NAN]),
        (Recipe, "seed", [2**63, -(2**63) - 1, 10**400]),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_a_senseless_value_is_refused_at_construction(config, name, values):
    for value in values:
        with pytest.raises(UsageError):
            config(**{name: value})


def test_a_refused_value_is_named_with_what_was_expected():
    with pytest.raises(UsageError, match=r"^DistillConfig\.factor must lie in 1..64, got 0$"):
        Recipe().replace({"distill.factor": 0})
    with pytest.raises(UnknownNameError, match="Did you mean 'noise'"):
        DistillConfig(initialisation="nois")
    with pytest.raises(UnknownNameError, match="Did you mean 'soft'"):
        EvaluateConfig(labels=("sotf",))


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (DistillConfig, {"iterations": 0, "alpha": 0.0, "calibration": 0.0, "weight": 0.0}),
        (DistillConfig, {"alpha": 1.0, "initialisation": "noise", "factor": 1, "sampler_momentum": 0.0}),
        (EvaluateConfig, {"full_repeats": 0, "labels": ("soft",), "cutmix": 1.0}),
        (PretrainConfig, {"cutmix": 0.0, "weight_decay": 0.0, "momentum": 0.0, "snapshots": 59}),
        (Recipe, {"ipc": 1, "validation": 0.0, "seed": -(2**63)}),
        (Recipe, {"seed": 2**63 - 1}),
        (NetworkConfig, {"width": 1, "norm": "instance"}),
        (NetworkConfig, {"width": 1, "norm": "group", "name": "resnet18"}),
    ],
)
def test_values_at_the_edge_are_taken(config, changes):
    made = config(**changes)
    assert {name: getattr(made, name) for name in changes} == changes


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_cannot_be_changed_and_has_defaults_that_make_sense(config):
    made = config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(made)[0].name, 1)
    assert made == config()
    assert config.__doc__


# changes by dotted names


def test_replacing_changes_the_named_fields_and_nothing_else():
    old = Recipe()
    new = old.replace({"distill.alpha": 0.3, "network.width": 16, "ipc": 7})
    assert (new.distill.alpha, new.network.width, new.ipc) == (0.3, 16, 7)
    back = {"distill.alpha": old.distill.alpha, "network.width": old.network.width, "ipc": old.ipc}
    assert new.replace(back) == old == Recipe()
    assert Recipe().replace({}) == Recipe()


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("ipc", "7", 7),
        ("seed", "-3", -3),
        ("validation", "0.25", 0.25),
        ("network.name", "resnet18", "resnet18"),
        ("distill.learning_rate", "1e-3", 1e-3),
        ("distill.learning_rate", "1", 1.0),
        ("distill.iterations", "0", 0),
        ("distill.augment_shared", "false", False),
        ("distill.augment_shared", "False", False),
        ("distill.augment_shared", "0", False),
        ("distill.augment_shared", "true", True),
        ("distill.augment_shared", "TRUE", True),
        ("distill.augment_shared", "1", True),
        ("evaluate.labels", "soft", ("soft",)),
        ("evaluate.labels", "soft,hard", ("soft", "hard")),
        ("evaluate.labels", "teacher", ("teacher",)),
        ("evaluate.augment", "color_crop|scale", "color_crop|scale"),
    ],
)
def test_text_is_read_by_the_type_of_the_field(path, text, value):
    found = Recipe().replace({path: text})
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_every_field_can_be_set_from_the_text_of_its_default():
    def text(value) -> str:
        return ",".join(value) if isinstance(value, tuple) else str(value)

    def flat(content: dict, prefix: str = "") -> dict[str, str]:
        rows: dict[str, str] = {}
        for name, value in content.items():
            rows |= (
                flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: text(value)}
            )
        return rows

    recipe = PRESETS["digits"].recipe()
    assert Recipe().replace(flat(dataclasses.asdict(recipe))) == recipe


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("ipc", "ten", "int"),
        ("ipc", "1.5", "int"),
        ("ipc", "", "int"),
        ("distill.alpha", "half", "float"),
        ("distill.augment_shared", "maybe", "true or false"),
        ("distill.augment_shared", "", "true or false"),
    ],
)
def test_text_of_another_type_is_refused_and_names_the_setting(path, value, expected):
    with pytest.raises(UsageError, match=rf"{path}: expected {expected}, got {value!r}"):
        Recipe().replace({path: value})


@pytest.mark.parametrize(
    ("path", "close"),
    [
        ("distill.alfa", "distill.alpha"),
        ("distil.alpha", "distill.alpha"),
        ("evaluate.epoch", "evaluate.epochs"),
        ("ipcs", "ipc"),
        ("ipc.x", "ipc"),
        ("distill.alpha.x", "distill.alpha"),
    ],
)
def test_an_unknown_setting_is_refused_and_names_the_close_ones(path, close):
    with pytest.raises(UnknownNameError, match=rf"unknown setting '{path}'.*Did you mean .*'{close}'"):
        Recipe().replace({path: "1"})


@pytest.mark.parametrize("path", ["distill", "", ".", "distill.", "__class__"])
def test_a_group_of_settings_is_not_a_setting(path):
    with pytest.raises(UnknownNameError, match=r"Known: .*distill\.alpha, .*ipc"):
        Recipe().replace({path: "1"})


# to plain data and back


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_a_recipe_comes_back_from_its_dictionary_also_through_json(name):
    recipe = (Recipe() if name is None else PRESETS[name].recipe()).replace({"seed": 5, "validation": 0.2})
    content = dataclasses.asdict(recipe)
    assert Recipe.from_dict(content) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(content))) == recipe


def test_a_dictionary_without_some_fields_gets_the_defaults():
    assert Recipe.from_dict({"distill": {"alpha": 0.3}}) == Recipe().replace({"distill.alpha": 0.3})


@pytest.mark.parametrize(
    "content", [{"distill": {"alfa": 0.3}}, {"speed": 1}, {"network": 3}, {"ipc": {"a": 1}}]
)
def test_a_dictionary_with_fields_that_do_not_exist_is_refused(content):
    with pytest.raises(UnknownNameError):
        Recipe.from_dict(content)


@pytest.mark.parametrize("content", [None, 5, ["ipc"]])
def test_what_is_no_dictionary_is_refused(content):
    with pytest.raises(UsageError, match="settings of a recipe must be an object"):
        Recipe.from_dict(content)


# presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_row_is_a_valid_recipe(name):
    preset = PRESETS[name]
    recipe = preset.recipe()
    assert recipe.ipc == preset.ipc
    for path, value in preset.changes.items():
        group, _, setting = path.partition(".")
        assert getattr(getattr(recipe, group), setting) == value


@pytest.mark.parametrize(
    ("dataset", "spec", "size", "depth", "learning_rate", "epochs", "ipcs"),
    [
        ("cifar10", "cifar10", None, 3, 3.2e-3, 2000, (1, 10, 50)),
        ("cifar100", "cifar100", None, 3, 9.8e-3, 2000, (1, 10, 50)),
        ("tinyimagenet", "folder", 64, 4, 1.4e-2, 300, (1, 10, 50)),
        *((f"image{subset}", "folder", 128, 5, 3.2e-3, 2000, (1, 10)) for subset in SUBSETS),
    ],
)
def test_published_rows_are_the_papers(dataset, spec, size, depth, learning_rate, epochs, ipcs):
    for ipc in ipcs:
        preset = PRESETS[f"{dataset}-ipc{ipc}"]
        recipe = preset.recipe()
        assert (preset.dataset, preset.ipc, preset.size) == (spec, ipc, size)
        assert recipe.network == NetworkConfig("convnet", width=128, depth=depth, norm="instance")
        assert recipe.pretrain == PretrainConfig(
            networks=20,
            epochs=60,
            learning_rate=0.01,
            momentum=0.9,
            weight_decay=5e-4,
            batch_size=128,
            augment="color_crop",
            cutmix=0.5,
        )
        assert recipe.distill == DistillConfig(
            iterations=20_000,
            real_batch=1024,
            frequencies=4096,
            alpha=0.5,
            weight=300,
            calibration=1,
            factor=2,
            learning_rate=learning_rate,
            schedule="constant",
            sampler_learning_rate=1e-3,
            sampler_momentum=0.5,
        )
        assert recipe.evaluate == EvaluateConfig(
            epochs=epochs,
            learning_rate=1e-3,
            batch_size=128,
            augment="flip_color_crop|scale|rotate",
            cutmix=0.5,
            repeats=10,
        )


@pytest.mark.parametrize("name", ["digits", "mnist", "svhn"])
def test_digits_are_never_mirrored(name):
    recipe = PRESETS[name].recipe()
    for strategy in (recipe.evaluate.augment, recipe.distill.augment, recipe.pretrain.augment):
        assert "flip" not in strategy


def test_a_named_preset_beats_dataset_and_ipc():
    assert find_preset("cpu", "cifar100", 50) == ("cpu", PRESETS["cpu"])


@pytest.mark.parametrize(
    ("dataset", "ipc", "found"),
    [
        ("cifar10", 50, "cifar10-ipc50"),
        ("cifar10", 1, "cifar10-ipc1"),
        ("cifar10", None, "cifar10-ipc10"),
        ("cifar10", 7, "cifar10-ipc10"),
        ("digits", None, "digits"),
        ("digits", 1, "digits"),
        ("fashion_mnist", 50, "fashion_mnist"),
    ],
)
def test_without_a_name_the_row_of_dataset_and_ipc_comes_before_that_of_the_dataset(dataset, ipc, found):
    assert find_preset(None, dataset, ipc) == (found, PRESETS[found])


def test_a_dataset_without_a_row_gets_the_defaults():
    name, preset = find_preset(None, "folder", 3)
    assert (name, preset) == ("default", Preset("folder", 10))
    assert preset.recipe() == Recipe()


@pytest.mark.parametrize(
    ("name", "close"), [("cifar10-ipc5", "cifar10-ipc50"), ("digit", "digits"), ("CPU", None)]
)
def test_an_unknown_preset_is_refused_and_names_the_close_ones(name, close):
    with pytest.raises(UnknownNameError, match=f"unknown preset '{name}'") as error:
        find_preset(name, "digits", None)
    assert all(preset in str(error.value) for preset in PRESETS)
    assert close is None or f"'{close}'" in str(error.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("ipc", 1.5),
        ("ipc", True),
        ("ipc", INF),
        ("network.name", None),
        ("network.name", 3),
        ("distill.augment_shared", None),
        ("distill.augment_shared", 2),
        ("evaluate.labels", 3),
    ],
)
def test_a_value_of_another_type_is_refused(path, value):
    with pytest.raises(UsageError, match=rf"\.{path.rpartition('.')[2]} must be"):
        Recipe().replace({path: value})


def test_the_last_part_of_a_setting_is_close_to_it():
    with pytest.raises(UnknownNameError, match=r"Did you mean .*distill\.alpha"):
        Recipe().replace({"alpha": "0.3"})


def test_settings_that_fit_together_are_taken_in_any_order():
    changes = {"pretrain.snapshots": 40, "pretrain.epochs": 60, "network.norm": "group", "network.width": 30}
    with pytest.raises(UsageError, match=r"width must be a multiple of 4"):
        Recipe().replace(changes)
    changes["network.width"] = 32
    assert Recipe().replace(changes) == Recipe().replace(dict(reversed(changes.items())))


def test_networks_see_nothing_but_the_images_only_without_augmentation_and_mixing():
    assert not EvaluateConfig(augment="none", cutmix=0).augmented
    assert EvaluateConfig(augment="none", cutmix=0.1).augmented
    assert EvaluateConfig(augment="flip", cutmix=0).augmented
