"""Search spaces: every combination once, other values by name, functions of the user."""

import dataclasses
import functools
import hashlib
import importlib
import os
import random
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from commands import ROOT

from distilled_data import UnknownNameError, UsageError
from ncfm_engine.networks import NORMS, build_network
from ncfm_engine.spaces import LISTED, SPACES, Space, load_space, settings_kept

SIZE = {"channels": 3, "size": (16, 16), "classes": 4}


def test_the_grid_of_convnets_has_720_different_architectures():
    space = SPACES["convnet"]
    every = {tuple(architecture.items()) for architecture in space}
    assert len(space) == len(every) == 720
    axes = {"width": (32, 64, 128, 256), "depth": (1, 2, 3, 4)}
    assert {name: space.axes[name] for name in axes} == axes
    assert set(space.axes["norm"]) == {"none", "batch", "layer", "instance", "group"}
    assert set(space.axes["activation"]) == {"sigmoid", "relu", "leakyrelu"}
    assert set(space.axes["pooling"]) == {"none", "max", "avg"}


def test_a_draw_is_random_without_repetition_and_a_longer_one_begins_with_it():
    space = SPACES["resnet"]
    few, all_ = space.draw(20), space.draw()
    assert all_[:20] == few
    assert len({tuple(architecture.items()) for architecture in all_}) == len(all_) == len(space)
    assert few != list(space)[:20]
    assert few != space.draw(20, seed=1)
    assert len(space.draw(10**6)) == len(space)
    with pytest.raises(UsageError, match="count must be 0 or more, got -1"):
        space.draw(-1)


def test_weights_that_python_and_numpy_draw_are_those_of_the_seed():
    def build(channels, size, classes, x):
        linear = torch.nn.Linear(2, 2)
        linear.bias.data = torch.tensor([random.random(), np.random.rand()], dtype=torch.float32)
        return linear

    space = Space({"x": (1,)}, build)
    states = random.getstate(), np.random.get_state()[1].tolist()
    once, again, other = (space.network({"x": 1}, **SIZE, seed=seed).bias for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert (once != other).all()
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_network_is_trained_without_what_its_making_sets_for_the_process():
    def build(channels, size, classes, x):
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        return torch.nn.Linear(2, 2)

    Space({"x": (1,)}, build).network({"x": 1}, **SIZE, seed=0)
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == (torch.float32, True)


@pytest.mark.parametrize("left", [True, False])
def test_a_folder_that_is_deleted_while_a_network_is_trained_is_no_error_of_its(tmp_path, monkeypatch, left):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with settings_kept():
        if left:
            os.chdir("/")
        (tmp_path / "here").rmdir()
        torch.set_grad_enabled(False)
    assert torch.is_grad_enabled()
    with settings_kept():
        os.chdir("/")


def test_what_is_no_module_is_named():
    with pytest.raises(UsageError, match=r"build must return a torch\.nn\.Module, got int"):
        Space({"x": (1,)}, lambda x, **size: 3).network({"x": 1}, **SIZE, seed=0)


def test_a_network_that_was_trained_is_not_taken_for_a_new_one():
    linear = torch.nn.Linear(2, 2)
    space = Space({"x": (1,)}, lambda x, **size: linear)
    assert space.network({"x": 1}, **SIZE, seed=0) is linear
    linear(torch.rand(3, 2)).sum().backward()
    with pytest.raises(UsageError, match="has gradients for"):
        space.network({"x": 1}, **SIZE, seed=0)


def test_a_network_has_the_values_of_its_architecture_and_the_weights_of_its_seed():
    architecture = {"width": 8, "depth": 2, "norm": "batch", "activation": "sigmoid", "pooling": "max"}
    network = SPACES["convnet"].network(architecture, **SIZE, seed=3)
    expected = build_network("convnet", channels=3, size=16, classes=4, seed=3, **architecture)
    assert str(network) == str(expected)
    for ours, theirs in zip(network.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", SPACES)
def test_every_value_of_a_space_makes_a_network(name):
    space = SPACES[name].with_axes({"width": "8", "depth": "1,2"} if name == "convnet" else {"width": "4"})
    images = torch.rand(2, 3, 16, 16)
    for axis, values in space.axes.items():
        for value in values:
            architecture = next(iter(space)) | {axis: value}
            network = space.network(architecture, **SIZE, seed=0)
            assert network(images).shape == (2, 4)


def test_resnets_differ_in_width_stages_blocks_and_norm():
    def network(**architecture):
        usual = {"width": 4, "stages": 2, "blocks": 1, "norm": "batch"}
        return SPACES["resnet"].network(usual | architecture, **SIZE, seed=0)

    def count(**architecture):
        return sum(isinstance(module, torch.nn.Conv2d) for module in network(**architecture).modules())

    assert count(stages=2, blocks=1) == 1 + 2 * 2 + 1  # stem, two a block, one shortcut
    assert count(stages=3, blocks=2) == 1 + 3 * 2 * 2 + 2
    for width in (4, 6):
        assert f"(0): Conv2d(3, {width}, " in str(network(width=width))
    for norm in SPACES["resnet"].axes["norm"]:
        names = [str(module) for module in network(norm=norm).modules()]
        assert names.count(str(NORMS[norm](4))) == 3  # of the stem and the first block
        assert names.count(str(NORMS[norm](8))) == 3  # of the second block and its shortcut


def test_an_axis_takes_other_values_of_its_type():
    space = SPACES["convnet"].with_axes({"width": "4, 8", "norm": "none, batch"})
    assert space.axes["width"] == (4, 8)
    assert space.axes["norm"] == ("none", "batch")
    assert len(space) == 2 * 4 * 2 * 3 * 3
    with pytest.raises(UnknownNameError, match="unknown axis 'widht'"):
        space.with_axes({"widht": "4"})
    with pytest.raises(UnknownNameError, match=r"unknown norm 'instanc'\. Did you mean 'instance'\?"):
        SPACES["convnet"].with_axes({"norm": "instanc"})
    with pytest.raises(UsageError, match="axis width: expected int, such as 4, got 'wide'"):
        space.with_axes({"width": "wide"})
    flag = Space({"bias": (True,)}, torch.nn.Linear)
    assert flag.with_axes({"bias": "False,true"}).axes["bias"] == (False, True)
    with pytest.raises(UsageError, match="axis bias: expected bool, such as True, got 'maybe'"):
        flag.with_axes({"bias": "maybe"})
    mixed = Space({"n": ("none", 2, 0.5)}, torch.nn.Linear)
    assert mixed.with_axes({"n": "0.5,2,none"}).axes["n"] == (0.5, 2, "none")
    with pytest.raises(UsageError, match="axis rate has a value that is not finite"):
        Space({"rate": (0.1, 0.5)}, torch.nn.Linear).with_axes({"rate": "nan,0.1"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((), "expected texts"),
        ("abc", "expected texts"),
        (4, "expected texts"),
        ((None,), "expected texts"),
        ({"abc", "def"}, "in an order"),
        ((1, 1), "twice"),
    ],
)
def test_senseless_axes_are_refused(values, message):
    with pytest.raises(UsageError, match=f"axis a.*{message}"):
        Space({"a": values}, torch.nn.Linear)


@pytest.mark.parametrize("values", [(1, None), ((1, 2), (3, 4)), (torch.nn.ReLU, torch.nn.GELU), ({"k": 1},)])
def test_what_no_axis_holds_is_told_with_what_to_do(values):
    with pytest.raises(UsageError, match=r"got .*\. Give names to what is none of these, and let build look"):
        Space({"a": values}, torch.nn.Linear)


@pytest.mark.parametrize(
    "values", [np.geomspace(0.1, 1, 3), list(np.arange(3)), (1, np.float64(2)), [torch.tensor(1)]]
)
def test_numbers_of_numpy_and_torch_are_told_to_be_made_those_of_python(values):
    with pytest.raises(UsageError, match=r"got .*\. They have to be Python's own: \.tolist\(\) makes them"):
        Space({"a": values}, torch.nn.Linear)
    python = [getattr(value, "tolist", lambda value=value: value)() for value in values]
    assert list(Space({"a": python}, torch.nn.Linear).axes["a"]) == python


def test_a_space_without_an_axis_is_refused():
    with pytest.raises(UsageError, match="one axis at least"):
        Space({}, torch.nn.Linear)


def test_an_axis_that_is_no_argument_and_a_build_that_is_no_function_are_refused():
    with pytest.raises(UsageError, match="argument of build, a text; got 1"):  # a database would make it "1"
        Space({1: (2, 4)}, torch.nn.Linear)  # type: ignore
    with pytest.raises(UsageError, match="no axis can be called channels"):  # it would be given twice
        Space({"channels": (2, 4)}, torch.nn.Linear)
    with pytest.raises(UsageError, match=r"build must be a function .*, got 'net'"):
        Space({"a": (2, 4)}, "net")  # type: ignore


def test_the_code_of_a_user_is_known_by_its_text(tmp_path, monkeypatch):
    codes = []
    for number, text in enumerate(["return 1", "return 2", "return 1"]):
        (tmp_path / f"net{number}.py").write_text(f"def net(**options):\n    {text}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        codes.append(Space({"a": (1,)}, importlib.import_module(f"net{number}").net).code)
    script = ModuleType("script_used")  # as __main__ it has a file and no specification
    monkeypatch.setitem(sys.modules, "script_used", script)
    script.__file__ = str(tmp_path / "net2.py")
    exec((tmp_path / "net2.py").read_text(), vars(script))
    codes.append(Space({"a": (1,)}, script.net).code)
    hashes = [code.split()[1] for code in codes]
    assert hashes[0] == hashes[2] == hashes[3] != hashes[1]


def test_networks_of_this_project_have_no_code_of_a_user_under_any_name():
    ours = load_space("convnet")
    assert dataclasses.replace(ours, axes={"width": (8,)}, name="mine:space").own_code is None
    theirs = Space({"a": (1,)}, torch.nn.Linear)
    assert theirs.own_code == theirs.code


def test_the_code_of_a_user_is_all_modules_that_it_is_made_of(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "blocks_used.py").write_text(
        "import importlib\n"
        "whole = importlib.import_module('whole' + '_used')\n"
        "def net(**options):\n"
        "    return 1\n"
    )
    (tmp_path / "outer_used.py").write_text(
        "from random import random\n"  # a method, which has no module
        "import importlib, torch\n"
        "net = importlib.import_module('blocks' + '_used').net\n"
        "class Build:\n"
        "    def __call__(self, **options):\n"
        "        return net()\n"
    )
    (tmp_path / "whole_used.py").write_text("SIZE = 1\n")
    build = importlib.import_module("outer_used").Build()
    codes = [Space({"a": (1,)}, build).code]
    for changed in ("whole_used", "blocks_used", "outer_used"):
        with (tmp_path / f"{changed}.py").open("a") as file:
            file.write("# otherwise\n")
        codes.append(Space({"a": (1,)}, build).code)
    assert len(set(codes)) == 4
    assert codes[0].startswith("outer_used.Build ")


def test_the_code_of_a_user_is_what_it_takes_numbers_from_and_what_it_imports_later(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "late_package").mkdir()
    (tmp_path / "late_package" / "__init__.py").write_text("")
    (tmp_path / "late_package" / "made.py").write_text("from . import parts\n")
    (tmp_path / "late_package" / "parts.py").write_text("")
    (tmp_path / "late_package" / "broken.py").write_text("def\n")
    (tmp_path / "sizes_used.py").write_text("HIDDEN = 4\n")
    (tmp_path / "plain_used.py").write_text("")
    (tmp_path / "late_used.py").write_text(
        "from sizes_used import HIDDEN\n"
        "def net(**options):\n"
        "    from late_package.made import net\n"
        "    from late_package import broken\n"
        "    import plain_used\n"
        "    import no_such_package.here\n"
        "    return net(HIDDEN)\n"
    )
    build = importlib.import_module("late_used").net
    codes = [Space({"a": (1,)}, build).code]
    for changed in ("sizes_used", "plain_used", "late_package/made", "late_package/parts"):
        with (tmp_path / f"{changed}.py").open("a") as file:
            file.write("# otherwise\n")
        codes.append(Space({"a": (1,)}, build).code)
    assert len(set(codes)) == 5


@pytest.mark.parametrize(
    ("name", "encoding", "head"),
    [("latin_used", "latin-1", "# coding: latin-1\n# größer\n"), ("bom_used", "utf-8-sig", "")],
)
def test_the_code_of_a_user_is_read_as_python_reads_it(tmp_path, monkeypatch, name, encoding, head):
    monkeypatch.syspath_prepend(str(tmp_path))
    text = f"{head}def net(**options):\n    from {name}_later import net\n    return net()\n"
    (tmp_path / f"{name}.py").write_text(text, encoding=encoding)
    build, codes = importlib.import_module(name).net, []
    for later in ("", "# otherwise\n"):
        (tmp_path / f"{name}_later.py").write_text(later)
        codes.append(Space({"a": (1,)}, build).code)
    assert codes[0] != codes[1]


def test_the_code_of_a_user_is_what_packages_above_give(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "above_used" / "inner").mkdir(parents=True)
    for name in ("__init__", "inner/__init__", "parts", "inner/beside"):
        (tmp_path / "above_used" / f"{name}.py").write_text("")
    (tmp_path / "above_used" / "inner" / "made.py").write_text(
        "def net(**options):\n    from ..parts import net\n    from .beside import net\n    return net()\n"
    )
    build = importlib.import_module("above_used.inner.made").net
    codes = [Space({"a": (1,)}, build).code]
    for changed in ("parts", "inner/beside"):
        (tmp_path / "above_used" / f"{changed}.py").write_text("# otherwise\n")
        codes.append(Space({"a": (1,)}, build).code)
    assert len(set(codes)) == 3


def test_the_code_of_a_space_is_also_the_module_that_chose_what_is_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (
        "from torchvision.models import resnet18\n"
        "from ncfm_engine.spaces import Space\n"
        "def space():\n"
        "    return Space({'a': (1,)}, resnet18)\n"
    )
    codes = []
    for more in ("", "# otherwise\n"):
        (tmp_path / "chooser_used.py").write_text(text + more)
        codes.append(load_space("chooser_used:space").code)
    assert codes[0] != codes[1]


def test_the_code_is_that_of_the_moment_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lazy_nets").mkdir()
    (tmp_path / "lazy_nets" / "__init__.py").write_text(
        "def net(**options):\n    from .blocks import net\n    return net()\n"
    )
    (tmp_path / "lazy_nets" / "blocks.py").write_text("def net():\n    return 1\n")
    space = Space({"a": (1,)}, importlib.import_module("lazy_nets").net)
    before = space.code
    space.build()
    assert space.code == before


def test_what_is_installed_or_bound_is_told_apart():
    resnets = importlib.import_module("torchvision.models.resnet")
    axes = {"a": (1,)}
    built = [resnets.resnet18, *(functools.partial(resnets.resnet18, progress=x) for x in (True, False))]
    codes = [Space(axes, build).code for build in (*built, functools.partial(resnets.resnet34))]
    assert len(set(codes)) == 4
    nothing = hashlib.sha256(b"").hexdigest()[:12]
    assert not any(code.endswith(nothing) for code in codes)


def test_spaces_that_one_module_makes_are_told_apart_by_name_whatever_they_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "closures_used.py").write_text(
        "import functools, torch  # “by heart”\n"
        "from ncfm_engine.spaces import Space\n"
        "def made(hidden, block=lambda: None):\n"
        "    def build(**options):\n"
        "        return hidden\n"
        "    return build\n"
        "def small():\n"
        "    return Space({'a': (1, 2)}, made(2))\n"
        "def large():\n"
        "    return Space({'a': (1, 2)}, made(128))\n"
        "def part():\n"
        "    return Space({'a': (1, 2)}, functools.partial(made, torch.nn.Linear(4, 4), block=lambda: 1))\n",
        encoding="utf-8",
    )
    names = [f"closures_used:{name}" for name in ("small", "large", "part")]
    codes = [load_space(name).code for name in names]
    assert len(set(codes)) == 3
    assert codes == [load_space(name).with_axes({"a": "2"}).code for name in names]
    weights = [load_space(names[2]).build.args[0].weight for _ in range(2)]
    assert torch.equal(*weights)
    code = (
        "import sys; sys.path.insert(0, '');"
        f"from ncfm_engine.spaces import load_space; print(load_space({names[2]!r}).code)"
    )
    ascii = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ascii
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert said.stdout.strip() == codes[2]


def test_a_few_of_very_many_are_drawn_without_listing_all():
    space = Space({f"axis{k}": tuple(range(10)) for k in range(12)}, torch.nn.Linear)
    drawn = space.draw(200, seed=1)
    assert drawn == space.draw(200, seed=1) != space.draw(200, seed=2)
    assert len({tuple(architecture.items()) for architecture in drawn}) == 200
    assert {architecture["axis11"] for architecture in drawn} == set(range(10))
    for count in (None, LISTED + 1):
        with pytest.raises(UsageError, match=r"1,000,000,000,000 architectures; draw some: --candidates"):
            space.draw(count)
    more = Space({f"axis{k}": tuple(range(10)) for k in range(30)}, torch.nn.Linear)
    assert len(more.draw(3)) == 3


def test_what_a_users_module_raises_is_said_and_what_it_imports_later_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "broken_space.py").write_text("def space(:\n")
    (tmp_path / "late_part.py").write_text("import torch\nMODULE = torch.nn.Linear\n")
    (tmp_path / "late_space.py").write_text(
        "from ncfm_engine.spaces import Space\n"
        "def net(channels, size, classes, a):\n"
        "    import late_part\n"
        "    return late_part.MODULE(channels, classes)\n"
        "def space():\n"
        "    return Space({'a': (1,)}, net)\n"
        "def fails():\n"
        "    raise KeyError('width')\n"
    )
    (tmp_path / "script_space.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UsageError, match="broken_space:space cannot be had: SyntaxError"):
        load_space("broken_space:space")
    with pytest.raises(UsageError, match="late_space:fails cannot be had: KeyError: 'width'"):
        load_space("late_space:fails")
    with pytest.raises(UsageError, match="script_space:space cannot be had: SystemExit: 0"):
        load_space("script_space:space")
    with pytest.raises(UsageError, match=":space cannot be had: ValueError"):
        load_space(":space")
    assert load_space("late_space:space").network({"a": 1}, **SIZE, seed=0).weight.shape == (4, 3)


def test_a_space_of_the_user_is_what_his_function_returns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from ncfm_engine.spaces import Space\n"
        "def net(channels, size, classes, hidden):\n"
        "    side = channels * size[0] * size[1]\n"
        "    layers = torch.nn.Linear(side, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, classes)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), *layers)\n"
        "def space():\n"
        "    return Space({'hidden': (3, 5)}, net)\n"
        "def other():\n"
        "    return {'hidden': (3, 5)}\n"
    )
    space = load_space("mine:space")
    once, again, other = (space.network({"hidden": 5}, **SIZE, seed=seed) for seed in (1, 1, 2))
    assert once(torch.rand(2, 3, 16, 16)).shape == (2, 4)
    assert torch.equal(once[1].weight, again[1].weight)
    assert not torch.equal(once[1].weight, other[1].weight)
    with pytest.raises(UsageError, match=r"mine:other must return a Space of ncfm_engine.spaces, got dict"):
        load_space("mine:other")
    with pytest.raises(UsageError, match=r"mine:nothing cannot be had: .*nothing"):
        load_space("mine:nothing")
    for path in ("mine.py", "./mine", "folder/mine.py", str(tmp_path / "mine.py")):
        with pytest.raises(UsageError, match=r"got a path\. From the folder that it is in: mine:space$"):
            load_space(f"{path}:space")
    with pytest.raises(UsageError, match="nowhere:space cannot be had: No module named 'nowhere'"):
        load_space("nowhere:space")
    with pytest.raises(UnknownNameError, match=r"unknown space 'convnets'. Did you mean 'convnet'\?"):
        load_space("convnets")
