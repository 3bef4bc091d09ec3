"""The tests are sealed: no network, no token, no user cache; every file they write lies in tmp_path."""

import gc
import os
import runpy
import shutil
import sys
import tempfile
import time
from types import SimpleNamespace

# Read by the libraries when they are imported. Nothing listens on port 9; a test that needs a Hub starts it.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="distilled-data-tests-")
os.environ["XDG_CACHE_HOME"] = os.environ["HF_HOME"]  # until a test has a cache of its own
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["COLUMNS"] = "100"  # of errors and help: without a terminal, too, and whatever xdist's workers say
os.environ["MATPLOTLIBRC"] = os.path.dirname(__file__)
os.environ.pop("HF_TOKEN", None)
os.environ.pop("HF_HUB_OFFLINE", None)
os.environ.pop("HF_HUB_CACHE", None)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each process of the tests compiles all modules anew

import pytest
import torch
from artifacts import make_artifact, make_folder
from commands import ROOT, distil, flags
from filelock import FileLock
from hub_server import LoopbackHub

from distilled_data import Artifact, DistilledDataset, Metadata

torch.set_num_threads(1)  # small work is faster so, and rounds like the commands that the tests start


def pytest_configure():
    os.chmod(os.environ["HF_HOME"], 0o755)  # also for the user that may write nothing


def pytest_collection_finish():
    gc.freeze()  # what was imported is no garbage, and looking through it takes 0.3 s each time


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect():
    """Nor is what the tests of other files have imported since then."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _little_work(monkeypatch):
    """Small sources are prepared without other processes, which take 0.1 s to start from one this large."""
    monkeypatch.setattr("ncfm_engine.sources.spread.START", {"fork": 0.1})


@pytest.fixture
def loopback(monkeypatch):
    """A Hub of its own; who waits before he calls it again, waits a moment."""
    moment = SimpleNamespace(**{name: getattr(time, name) for name in ("time", "monotonic", "perf_counter")})
    moment.sleep = lambda seconds: time.sleep(min(seconds, 0.01))
    for module in ("distilled_data.client", "huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", moment)
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def databases():
    """SQLite does not wait for the disk at each step, which takes most of the time of a small search."""
    from sqlalchemy import Engine, event

    def hurry(connection, _):
        connection.execute("PRAGMA synchronous = off")

    event.listen(Engine, "connect", hurry)
    yield
    event.remove(Engine, "connect", hurry)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Complete artifact folders of real digits by their images per class; to be read only."""
    path = tmp_path_factory.mktemp("folders")
    return {ipc: make_folder(path / f"ipc{ipc}", make_artifact(ipc)) for ipc in (1, 2, 3)}


@pytest.fixture(scope="session")
def digits():
    from ncfm_engine.sources import load_source

    return load_source("digits")


@pytest.fixture(scope="session")
def pool(digits, tmp_path_factory):
    """Two small feature networks, barely trained: enough to play against."""
    from ncfm_engine.config import NetworkConfig, PretrainConfig
    from ncfm_engine.pretrain import pretrain

    return pretrain(
        PretrainConfig(networks=2, epochs=1),
        NetworkConfig(width=8, depth=2),
        digits,
        seed=0,
        device="cpu",
        cache=tmp_path_factory.mktemp("cache"),
    )


@pytest.fixture
def artifact() -> Artifact:
    """Three ranks of four classes, factor 2, with logits; every tensor element has a value of its own."""
    images = (torch.arange(3 * 4 * 1 * 6 * 6) * 37 % 251).to(torch.uint8).view(3, 4, 1, 6, 6)
    logits = ((torch.arange(3 * 4 * 4 * 4) * 29 % 97).half() / 8 - 6).view(3, 4, 4, 4)
    metadata = Metadata(
        dataset="made up",
        classes=("ant", "bee", "cat", "dog"),
        channels=1,
        height=6,
        width=6,
        mean=(0.5,),
        std=(0.25,),
        ipc=3,
        factor=2,
        labels={"kind": "logits", "temperature": 2.0},
    )
    return Artifact(images, metadata, logits)


@pytest.fixture
def data(artifact) -> DistilledDataset:
    return DistilledDataset(artifact)


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Run a tool in this process and in tmp_path: (exit status, output, errors)."""

    def run(tool: str, *arguments: str, settings=()) -> tuple[int, str, str]:
        path = ROOT / "tools" / tool
        arguments = (*arguments, *flags(settings))
        monkeypatch.setattr("ncfm_engine.allocator.keep_freed", lambda: None)  # for all tests to come
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(path.parent))
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder in which the main job ran once, for all workers of xdist; `out` there is to be read only."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "work"
    with FileLock(f"{folder}.lock"):
        if not (said := folder / "said").exists():
            folder.mkdir(exist_ok=True)
            result = distil(folder, "--dataset", "digits", "--ipc", "3", "--output", "out")
            assert result.returncode == 0, result.stderr
            said.write_text(result.stdout)
    return folder, said.read_text()
