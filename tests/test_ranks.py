"""Several processes: the same result as one, and a clear end when one of them fails."""

import datetime
import json
import os
import signal
import socket
import sys
import weakref
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from children import finish, start
from safetensors.torch import load_file, save_file

from distilled_data import DistilledDataError, RankError, UsageError
from ncfm_engine import ranks as module
from ncfm_engine.config import DistillConfig, NetworkConfig
from ncfm_engine.distill import distill
from ncfm_engine.matching import MatchingStep
from ncfm_engine.pool import FeaturePool, build
from ncfm_engine.ranks import Ranks, join
from ncfm_engine.sources import load_source
from ncfm_engine.stop import Stopped, StopRequest


def distil_together(folder: Path, dies: int | None = None, stops: int | None = None) -> None:
    """Be one of several; the one with rank `dies` is killed, the one with rank `stops` is asked to stop."""
    digits = load_source("digits")
    networks = [build(NetworkConfig(width=8, depth=2), digits, seed) for seed in range(4)]
    weights = torch.stack([torch.nn.utils.parameters_to_vector(n.parameters()).detach() for n in networks])
    pool = FeaturePool(networks[0], weights.unflatten(0, (2, 2)))
    config = DistillConfig(iterations=12, real_batch=20, frequencies=32, factor=1, checkpoint_every=4)
    backward = MatchingStep.backward

    def die(self, images, step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(self, images, step)

    try:
        with join("cpu") as ranks:
            if dies == ranks.rank:
                MatchingStep.backward = die
            stop = StopRequest(0) if stops == ranks.rank else None
            options = {"identity": {}, "resume": True, "ranks": ranks, "stop": stop}
            result = distill(config, digits, pool, ipc=2, seed=0, device="cpu", folder=folder, **options)
            if ranks.rank == 0:
                save_file({"images": result.images.contiguous()}, folder / "images.safetensors")
    except (DistilledDataError, Stopped) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def meet_and_part(_: Path) -> None:
    with join("cpu") as ranks:
        import_module("torch.distributed.nn.functional")  # as parts of torch do when they are first used
        group = weakref.ref(dist.group.WORLD)
        ranks.barrier()
    if group() is not None:
        sys.exit("its threads live on, and abort the process if they drop a tensor while Python ends")


def play(folder: Path, ranks: int, part=distil_together, fresh=False, **options: int) -> tuple[int, str]:
    """Have `part` played by `ranks` processes: (worst exit status, all that they wrote)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    said = [folder / f"said by {rank}" for rank in range(ranks)]
    processes = [
        start(partial(part, folder, **options), output=said[rank], fresh=fresh, **meeting, RANK=str(rank))
        for rank in range(ranks)
    ]
    return max(abs(finish(process)) for process in processes), "".join(map(Path.read_text, said))


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
    status, errors = play(tmp_path, 2, meet_and_part, fresh=True)
    assert status == 0, errors


def test_parts_cover_all_classes_once_and_are_even():
    for count in (1, 2, 3, 7, 10):
        parts = [range(10)[Ranks(rank, count).part(10)] for rank in range(count)]
        assert [number for part in parts for number in part] == list(range(10))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_processes_than_classes_are_refused():
    with pytest.raises(UsageError, match="11 processes are more than the 10 classes"):
        Ranks(0, 11).part(10)


def test_a_rendezvous_that_nobody_answers_is_an_error_that_names_the_place(monkeypatch):
    monkeypatch.setattr(module, "MEET", datetime.timedelta(seconds=1))
    meeting = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in meeting.items():
        monkeypatch.setenv(name, value)
    expected = r"process 1 of 2 did not meet the others at 127\.0\.0\.1:9 within 1 s"
    with pytest.raises(RankError, match=expected), join("cpu"):
        pass
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(RankError, match="environment variable MASTER_PORT expected"), join("cpu"):
        pass
