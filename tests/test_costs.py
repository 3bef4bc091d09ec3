"""What a run took, over all its pieces."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import ROOT

from ncfm_engine.costs import Costs, held


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_pieces_of_a_stage_add_up_and_peaks_are_the_largest(tmp_path, monkeypatch):
    path, clock = tmp_path / "costs.json", iter([0, 9, 10, 10.5, 20, 22.25])
    monkeypatch.setattr("ncfm_engine.costs.time", SimpleNamespace(monotonic=clock.__next__))
    with Costs(path, "cpu", resume=False).stage("big"):
        torch.ones(200 * 2**20, dtype=torch.uint8)
    costs = Costs(path, "cpu", resume=True)
    for _ in range(2):
        with costs.stage("small"):
            pass
    stages = json.loads(path.read_text())
    assert stages == costs.stages
    assert {name: stage["seconds"] for name, stage in stages.items()} == {"big": 9, "small": 2.8}
    assert stages["big"]["peak_memory_mib"] >= stages["small"]["peak_memory_mib"] + 150
    assert stages["big"]["peak_gpu_mib"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the two apart")
def test_a_process_does_not_count_what_the_one_that_started_it_holds():
    large = torch.ones(1200 * 2**20, dtype=torch.uint8)
    code = """from ncfm_engine.costs import Costs
with (costs := Costs(None, "cpu", False)).stage("small"):
    pass
print(costs.stages["small"]["peak_memory_mib"])"""
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 50 < int(result.stdout) < 1000 < large.nbytes / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux cuts names")
def test_a_name_that_was_cut_within_a_character_keeps_nobody_from_counting():
    comm = Path("/proc/self/comm")
    before = comm.read_bytes()
    comm.write_bytes("entra\N{LATIN SMALL LETTER I WITH CIRCUMFLEX}nement".encode()[:6])
    try:
        assert held("VmHWM") > 50 * 2**20
    finally:
        comm.write_bytes(before)


def test_a_stage_that_fails_is_counted(tmp_path):
    costs = Costs(tmp_path / "costs.json", "cpu", resume=False)
    with pytest.raises(KeyError), costs.stage("bad"):
        raise KeyError
    assert set(json.loads((tmp_path / "costs.json").read_text())) == {"bad"}


def test_a_run_that_starts_anew_forgets_the_one_before(tmp_path):
    path = tmp_path / "costs.json"
    with Costs(path, "cpu", resume=False).stage("old"):
        pass
    with Costs(path, "cpu", resume=False).stage("new"):
        pass
    assert set(json.loads(path.read_text())) == {"new"}


def test_nothing_is_written_where_no_run_has_begun(tmp_path):
    with Costs(tmp_path / "absent" / "costs.json", "cpu", resume=False).stage("loading"):
        pass
    assert not any(tmp_path.iterdir())


def test_the_peak_of_a_gpu_is_that_of_the_largest_piece(monkeypatch):
    forgotten, peaks = [], iter([5 * 2**20, 3 * 2**20])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    costs = Costs(None, "cuda:0", resume=False)
    for _ in range(2):
        with costs.stage("distilling"):
            pass
    assert costs.stages["distilling"]["peak_gpu_mib"] == 5
    assert forgotten == [torch.device("cuda:0")] * 2


def test_a_run_that_has_no_costs_yet_can_be_resumed(tmp_path):
    assert Costs(tmp_path / "costs.json", "cpu", resume=True).stages == {}
    assert Costs(None, "cpu", resume=True).stages == {}


def test_where_no_system_tells_what_is_held_it_is_0(monkeypatch):
    monkeypatch.setattr("ncfm_engine.costs.Path", lambda name: Path("/nowhere"))
    assert held("VmHWM") > 50 * 2**20
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert held("VmHWM") == 0


def test_what_a_stage_took_neither_ends_a_run_nor_hides_its_end_where_it_cannot_be_written(tmp_path):
    (tmp_path / "costs.json").mkdir()
    costs = Costs(tmp_path / "costs.json", "cpu", resume=False)
    words = r"could not write .*costs\.json .*This run goes on without it\."
    with pytest.warns(UserWarning, match=words), costs.stage("good"):
        pass
    with pytest.warns(UserWarning, match=words), pytest.raises(KeyError), costs.stage("bad"):
        raise KeyError
    assert set(costs.stages) == {"good", "bad"}
