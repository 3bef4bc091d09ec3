"""Several processes: the same result as one, and a clear end when one of them fails."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distilled_data import UsageError
from ncfm_engine.ranks import Ranks

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from distilled_data import DistilledDataError
from ncfm_engine.config import DistillConfig, NetworkConfig, PretrainConfig
from ncfm_engine.distill import distill
from ncfm_engine.matching import MatchingStep
from ncfm_engine.pretrain import FeaturePool, build
from ncfm_engine.ranks import join
from ncfm_engine.sources import load_source
from ncfm_engine.stop import Stopped, StopRequest

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(1)
digits = load_source("digits")
networks = [build(NetworkConfig(width=8, depth=2), digits, seed) for seed in range(4)]
weights = torch.stack([torch.nn.utils.parameters_to_vector(n.parameters()).detach() for n in networks])
pool = FeaturePool(networks[0], weights.unflatten(0, (2, 2)), (0.0, 0.0))
config = DistillConfig(
    iterations=12, real_batch=20, frequencies=32, factor=1, checkpoint_every=4, **options.get("config", {})
)
try:
    with join("cpu") as ranks:
        if options.get("dies") == ranks.rank:
            real = MatchingStep.backward
            def backward(self, images, step):
                if step == 6:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(self, images, step)
            MatchingStep.backward = backward
        stop = StopRequest(0) if options.get("stops") == ranks.rank else None
        result = distill(config, digits, pool, ipc=2, seed=0, device="cpu", folder=folder, identity={},
                         resume=True, ranks=ranks, stop=stop)
        if ranks.rank == 0:
            save_file({"images": result.images.contiguous()}, folder / "images.safetensors")
except (DistilledDataError, Stopped) as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(3)
"""
PARTING = """
import sys, weakref
import torch.distributed as dist
from ncfm_engine.ranks import join

with join("cpu") as ranks:
    import torch.distributed.nn.functional  # as parts of torch do when they are first used
    group = weakref.ref(dist.group.WORLD)
    ranks.barrier()
if group() is not None:
    sys.exit("its threads live on, and abort the process if they drop a tensor while Python ends")
"""


def play(folder: Path, ranks: int, program: str = PROGRAM, **options) -> tuple[int, str]:
    """Run the program in `ranks` processes: (worst exit status, all that they wrote to stderr)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(folder), json.dumps(options)],
            env=environment() | meeting | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return max(abs(process.returncode) for process in processes), "".join(errors)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def images(folder: Path) -> torch.Tensor:
    return load_file(folder / "images.safetensors")["images"]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    status, errors = play(folder, 1)
    assert status == 0, errors
    return folder


@pytest.mark.parametrize("ranks", [2, 3])  # ten classes: 5 + 5, and 3 + 3 + 4
def test_several_processes_agree_with_one_to_rounding(alone, tmp_path, ranks):
    status, errors = play(tmp_path, ranks)
    assert status == 0, errors
    difference = (images(tmp_path) - images(alone)).abs()
    assert difference.median() < 1e-5
    # AdamW divides a gradient by its own size, so one near zero may turn over with the rounding
    assert (difference > 1e-3).float().mean() < 0.02
    for one, many in zip(rows(alone), rows(tmp_path), strict=True):
        assert many["step"] == one["step"]
        for name in ("discrepancy", "calibration", "amplitude", "phase"):
            assert many[name] == pytest.approx(one[name], rel=1e-3)


def test_a_process_that_dies_ends_all_and_the_checkpoint_goes_on_with_another_number(alone, tmp_path):
    status, errors = play(tmp_path, 2, dies=1)
    assert status != 0
    assert "RankError: process 0 of 2 lost another one" in errors
    assert "--resume" in errors
    assert not (tmp_path / "images.safetensors").exists()
    assert (tmp_path / "checkpoint.safetensors").exists()
    status, errors = play(tmp_path, 1)
    assert status == 0, errors
    assert ((images(tmp_path) - images(alone)).abs() > 1e-3).float().mean() < 0.02
    assert [row["step"] for row in rows(tmp_path)] == [10, 12]


def test_processes_stop_together_when_one_is_asked_to(tmp_path):
    _, errors = play(tmp_path, 2, stops=1)
    assert errors.count("Stopped: distil, step 10 of 12") == 2


def test_nothing_of_the_group_is_left_when_the_processes_part(tmp_path):
    status, errors = play(tmp_path, 2, program=PARTING)
    assert status == 0, errors


def test_parts_cover_all_classes_once_and_are_even():
    for count in (1, 2, 3, 7, 10):
        parts = [range(10)[Ranks(rank, count).part(10)] for rank in range(count)]
        assert [number for part in parts for number in part] == list(range(10))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_processes_than_classes_are_refused():
    with pytest.raises(UsageError, match="11 processes are more than the 10 classes"):
        Ranks(0, 11).part(10)


def test_a_rendezvous_that_nobody_answers_is_an_error_that_names_the_place(tmp_path):
    program = """
import datetime, sys
from distilled_data import RankError
from ncfm_engine import ranks
ranks.MEET = datetime.timedelta(seconds=1)
try:
    with ranks.join("cpu"):
        pass
except RankError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment() | {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "process 1 of 2 did not meet the others at 127.0.0.1:9 within 1 s" in result.stdout, result.stderr
