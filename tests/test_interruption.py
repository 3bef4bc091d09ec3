"""The main job interrupted, resumed and shared: the file is the same."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from types import SimpleNamespace

from children import finish, run_tool, start
from commands import TINY, called, command, flags

from distilled_data import DistilledDataset
from distilled_data.format import ARTIFACT_FILE, FOLDER_FILES


def test_a_run_killed_at_random_moments_and_resumed_gives_the_same_file(finished, tmp_path):
    folder, _ = finished
    moments = random.Random(int(os.environ.get("KILL_SEED", "0")))
    arguments = ("--dataset", "digits", "--ipc", "3", "--output", "killed", "--resume")
    cache = {"XDG_CACHE_HOME": str(folder / "a cache of its own")}
    ends = set()
    for number in range(int(os.environ.get("KILLS", "3"))):  # 20 by hand before a release
        process = start(run_tool, command(*arguments)[1:], folder, output=tmp_path / "said", **cache)
        process.join(moments.uniform(0, 0.5 * (number + 1)))
        process.kill()
        process.join()
        ends.add(process.exitcode)
        left = [path.name for path in (folder / "killed").glob("*") if not path.name.startswith(".")]
        assert set(left) <= {*FOLDER_FILES, "data"}
    assert -signal.SIGKILL in ends <= {-signal.SIGKILL, 0}  # not all were that fast
    cache = {"XDG_CACHE_HOME": str(folder / "cache")}
    process = start(run_tool, command(*arguments)[1:], folder, output=tmp_path / "said", **cache)
    assert finish(process) == 0, (tmp_path / "said").read_text()
    assert (folder / "killed" / ARTIFACT_FILE).read_bytes() == (folder / "out" / ARTIFACT_FILE).read_bytes()
    left = {path.name for name in ("killed", "killed.run") for path in (folder / name).iterdir()}
    whole = {path.name for name in ("out", "out.run") for path in (folder / name).iterdir()}
    assert left == whole  # no temporary file, no progress of what is finished


def test_a_finished_run_resumed_has_nothing_left_to_do(finished, here, tmp_path):
    for name in ("out", "out.run", "cache"):
        shutil.copytree(finished[0] / name, tmp_path / name, dirs_exist_ok=True)
    before = (tmp_path / "out" / ARTIFACT_FILE).stat().st_mtime_ns
    results = tmp_path / "out.run" / "results.json"
    rows = json.loads(results.read_text())["rows"]
    soft = rows[1]
    hashes = [soft["settings"], soft["content_hash"][:12], soft["teacher"][:12]]
    progress = tmp_path / "out.run" / f"evaluation-{'-'.join(hashes)}.safetensors"
    progress.write_bytes(b"of a run that was killed before it removed it")
    arguments = ("--dataset", "digits", "--ipc", "3", "--output", "out", "--resume")
    status, output, error = here("distill_and_push.py", *arguments, settings=TINY)
    assert status == 0, error
    assert "random images" in output
    assert "evaluate" not in error  # no bar of that stage
    assert not progress.exists()
    assert (tmp_path / "out" / ARTIFACT_FILE).stat().st_mtime_ns == before
    results.write_text(json.dumps({"rows": [row | {"random_n": 0} for row in rows]}))  # left out since
    status, output, error = here("distill_and_push.py", *arguments, settings=TINY)
    assert status == 0, error
    assert "evaluate (hard labels, random)" in error
    longer = [*TINY, "evaluate.epochs=4"]
    status, output, error = here("distill_and_push.py", *arguments, settings=longer)
    assert status == 0, error
    assert "evaluate" in error


def test_sigterm_stops_in_good_order_and_the_run_goes_on(finished):
    folder, _ = finished
    arguments = ("--dataset", "digits", "--ipc", "3", "--output", "terminated", "--resume")
    words = [*command(*arguments)[1:], *flags(["distill.iterations=100000"])]
    cache, output = {"XDG_CACHE_HOME": str(folder / "cache")}, folder / "said before the end"
    process = start(run_tool, words, folder, output=output, **cache)
    deadline = time.monotonic() + 60
    while not (folder / "terminated.run" / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert finish(process) == 75
    expected = r"stopped in good order \(distil, step \d+ of 100000\); go on with --resume"
    assert re.search(expected, output.read_text())


def test_two_processes_of_torchrun_do_the_main_job_together(finished):
    folder, _ = finished
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*launcher, *command("--dataset", "digits", "--ipc", "3", "--output", "two")[1:]]
    variables = {"XDG_CACHE_HOME": str(folder / "cache of two"), "PYTHONWARNINGS": "default"}
    result = called(words, folder, **variables)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("random images") == 1  # one of the two writes
    two, one = (DistilledDataset.from_folder(folder / name) for name in ("two", "out"))
    difference = (two.images.float() - one.images.float()).abs()
    assert (difference > 2).float().mean() < 0.02


def test_a_long_run_can_be_chained_from_short_ones_and_gives_the_same_file(
    finished, here, tmp_path, monkeypatch
):
    # A clock that ticks a second whenever it is looked at: what is stopped does not depend on the machine.
    monkeypatch.setattr("ncfm_engine.stop.time", SimpleNamespace(monotonic=itertools.count().__next__))
    arguments = ("--dataset", "digits", "--ipc", "3", "--output", "parts", "--resume", "--time-budget")
    status, output, _ = here("distill_and_push.py", *arguments, "0s", settings=TINY)
    where = "prepare, 1 of 2 files written"
    assert (status, output) == (75, f"stopped in good order ({where}); go on with --resume\n")
    stages = set()
    for _ in range(20):  # 13 are enough
        status, output, error = here("distill_and_push.py", *arguments, "9s", settings=TINY)
        if status != 75:
            break
        stages |= set(re.findall(r"order \((\w+)", output))
    assert status == 0, error
    assert stages == {"pretrain", "distil", "evaluate"}
    assert not list((tmp_path / "parts.run").glob("evaluation-*"))
    same = [(folder / ARTIFACT_FILE).read_bytes() for folder in (tmp_path / "parts", finished[0] / "out")]
    assert same[0] == same[1]
