"""The import table of the design: data flows one way, and using a set needs little more than torch."""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"torch", "numpy", "safetensors"}


@dataclass(frozen=True)
class Row:
    """What the modules of a folder may import, besides the standard library and their own package."""

    anywhere: set[str]
    in_functions: set[str] = frozenset()  # so that the package is importable without it


TABLE = {
    "distilled_data": Row(
        BASE, {"PIL", "datasets", "huggingface_hub", "pyarrow", "typing_extensions", "webdataset"}
    ),
    "ncfm_engine": Row(
        BASE | {"distilled_data", "torchvision"},
        {"filelock", "matplotlib", "optuna", "sklearn", "sqlalchemy", "tqdm"},
    ),
    "ncfm_engine/sources": Row(
        BASE | {"distilled_data", "torchvision", "PIL", "filelock"},
        {"datasets", "fsspec", "huggingface_hub", "webdataset"},
    ),
    "hub": Row(BASE | {"distilled_data", "huggingface_hub", "pyarrow", "PIL", "yaml"}, {"matplotlib"}),
    "tools": Row(
        BASE
        | {"distilled_data", "ncfm_engine", "hub", "huggingface_hub", "filelock", "command_line", "tests"}
    ),
    "tools/benchmark": Row(
        BASE | {"distilled_data", "ncfm_engine", "PIL"},
        {"torchvision", "webdataset", "sklearn", "matplotlib"},
    ),
    "tools/examples": Row(
        BASE
        | {"distilled_data", "ncfm_engine", "torchvision"}
        | {"accelerate", "lightning", "matplotlib", "optuna", "timm", "transformers"}
    ),
}
MODULES = {path.relative_to(ROOT) for folder in TABLE for path in (ROOT / folder).rglob("*.py")}


def imports(code: str) -> Iterator[tuple[str, bool]]:
    """Top-level name of every absolute import, and whether it is made only when a function is called, or by a
    type checker alone.
    """

    def visit(node: ast.AST, in_function: bool) -> Iterator[tuple[str, bool]]:
        names: list[str] = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(level=0):
                names = [node.module or ""]
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names = [name]
        yield from ((name.partition(".")[0], in_function) for name in names)
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typed = node.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" else []
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function or child in typed)

    yield from visit(ast.parse(code), False)


def forbidden(code: str, package: str, row: Row) -> list[str]:
    allowed = sys.stdlib_module_names | row.anywhere | {package}
    return [
        name
        for name, in_function in imports(code)
        if name not in allowed and not (in_function and name in row.in_functions)
    ]


@pytest.mark.parametrize("module", sorted(MODULES), ids=str)
def test_a_module_imports_only_what_the_table_allows(module):
    row = next(TABLE[str(folder)] for folder in module.parents if str(folder) in TABLE)
    assert forbidden((ROOT / module).read_text(), module.parts[0], row) == []


def test_every_package_has_a_row_in_the_table():
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    folders = {
        path.parent.relative_to(ROOT).as_posix() for package in packages for path in package.rglob("*.py")
    }
    assert folders <= set(TABLE)


@pytest.mark.parametrize(
    "code",
    [
        "import pandas",
        "import torchvision.transforms as T",
        "from ncfm_engine.config import Recipe",
        "import os, pandas",
        "try:\n import pandas\nexcept ImportError:\n pass",
        "if True:\n from PIL import Image",
        "if TYPE_CHECKING:\n import pandas",
        "if TYPE_CHECKING:\n pass\nelse:\n import datasets",
        "class A:\n import huggingface_hub",
        "def f():\n import pandas",
        "def f():\n def g():\n  from hub.card import render_card",
        "import importlib\nimportlib.import_module('pandas.core')",
        "def f():\n return __import__('pandas')",
    ],
)
def test_the_walk_sees_a_forbidden_import_in_any_form(code):
    assert len(forbidden(code, "distilled_data", TABLE["distilled_data"])) == 1


@pytest.mark.parametrize(
    "code",
    [
        "import os.path\nfrom collections.abc import Iterator",
        "from . import format\nfrom .errors import UsageError\nimport distilled_data.format",
        "import torch.nn.functional as F, numpy as np",
        "def f():\n from PIL import Image",
        "class A:\n def f(self):\n  import huggingface_hub",
        "if TYPE_CHECKING:\n import datasets",
    ],
)
def test_the_walk_lets_pass_what_is_allowed(code):
    assert forbidden(code, "distilled_data", TABLE["distilled_data"]) == []


# What a process of its own finds, once for both tests, because importing torch takes seconds.
UNNEEDED = (
    "torchvision",
    "datasets",
    "webdataset",
    "huggingface_hub",
    "PIL",
    "pyarrow",
    "ncfm_engine",
    "hub",
    "distilled_data.remote",
    "distilled_data.lock",
)
SLOW = ("optuna", "torch._dynamo", "triton")  # to import
MISSING = ("datasets", "webdataset", "sklearn", "matplotlib", "tqdm", "pyarrow", "huggingface_hub")
PROBE = f"""
import json, sys, traceback
import distilled_data
found = {{"loaded": [name for name in {UNNEEDED} if name in sys.modules]}}
sys.modules.update(dict.fromkeys({MISSING}))  # importing them raises ModuleNotFoundError from here on
try:
    import ncfm_engine.pipeline
    found["error"] = None
except ImportError:
    found["error"] = traceback.format_exc()
found["slow"] = [name for name in {SLOW} if name in sys.modules]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict:
    result = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout)


def test_importing_the_consumer_loads_nothing_that_it_does_not_need(found):
    assert found["loaded"] == []


def test_the_engine_imports_without_the_packages_of_single_sources_and_reports(found):
    assert found["error"] is None, found["error"]


def test_the_engine_imports_what_takes_long_where_it_is_used(found):
    assert found["slow"] == []


def test_every_package_folder_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in ROOT.glob("[!.]*/**/__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == found
