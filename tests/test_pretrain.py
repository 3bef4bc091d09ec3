"""The pool of feature networks: cached, interrupted, shared among ranks, and always the same networks."""

import contextlib
import dataclasses
import os
import signal
import warnings

import pytest
import torch
from children import context, finish, received, start
from interruptions import StopAfter
from loops import plain_epochs
from torch.nn.utils import parameters_to_vector

from distilled_data import DivergenceError, UsageError
from distilled_data.randomness import seed_at
from ncfm_engine import train
from ncfm_engine.batches import real_loader
from ncfm_engine.config import NetworkConfig, PretrainConfig
from ncfm_engine.pool import FlatNetwork, build
from ncfm_engine.pretrain import _milestones, pool_key, pool_schedule, pretrain, train_pool
from ncfm_engine.sources import load_source
from ncfm_engine.stop import Stopped, StopRequest
from ncfm_engine.train import Training

TINY = PretrainConfig(networks=2, epochs=2, batch_size=512)  # 3 steps an epoch
NARROW = NetworkConfig(width=4, depth=2)
ON_CPU = {"seed": 0, "device": "cpu"}


def truncate(content):
    return content[:-10]


def flip_a_bit(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def delete(content):
    return None


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, delete])
def test_a_pool_is_taken_from_the_cache_and_only_what_is_damaged_is_trained_again(digits, tmp_path, damage):
    options = ON_CPU | {"cache": tmp_path}
    pool = pretrain(TINY, NARROW, digits, **options)
    first, second = files = sorted((tmp_path / "pool" / pool_key(TINY, NARROW, digits, 0)).iterdir())
    before, content = first.stat().st_mtime_ns, damage(second.read_bytes())
    second.unlink() if content is None else second.write_bytes(content)
    again = pretrain(TINY, NARROW, digits, **options)
    assert first.stat().st_mtime_ns == before
    assert torch.equal(again.trajectory, pool.trajectory)
    assert sorted(first.parent.iterdir()) == files
    unasked = pretrain(TINY, NARROW, digits, **options, stop=StopAfter(0))
    assert torch.equal(unasked.trajectory, pool.trajectory)


def test_how_many_networks_train_at_once_changes_nothing_but_rounding(digits, tmp_path):
    alone = pretrain(TINY, NARROW, digits, **ON_CPU, cache=tmp_path / "alone")
    together = dataclasses.replace(TINY, at_once=2)
    assert pool_key(together, NARROW, digits, 0) == pool_key(TINY, NARROW, digits, 0)
    pool = pretrain(together, NARROW, digits, **ON_CPU, cache=tmp_path / "together")
    assert torch.allclose(pool.trajectory, alone.trajectory, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_a_pool_stopped_again_and_again_ends_with_the_same_bits(digits, tmp_path, size):
    config = dataclasses.replace(TINY, snapshots=1, at_once=size)
    whole = pretrain(config, NARROW, digits, **ON_CPU, cache=tmp_path / "whole")
    options, messages = ON_CPU | {"cache": tmp_path / "parts"}, []
    for _ in range(100):
        try:
            pool = pretrain(config, NARROW, digits, **options, stop=StopAfter(2))
            break
        except Stopped as stopped:
            messages.append(str(stopped))
    assert messages[1] == f"pretrain, network{'s 0-1' if size == 2 else ' 0'}, epoch 1 of 2"
    assert torch.equal(pool.trajectory, whole.trajectory)
    assert not list(tmp_path.rglob("training-*"))  # checkpoints go with the training they are of


def pretrain_until_killed(cache):
    def report(stage, done, total):
        if done == 3:  # network 0 is finished, network 1 has done one epoch
            os.kill(os.getpid(), signal.SIGKILL)

    digits = load_source("digits")
    train.CHECKPOINT_SECONDS = 0  # in this process, which is killed
    pretrain(TINY, NARROW, digits, **ON_CPU, cache=cache, report=report)


def test_a_killed_pretraining_goes_on_from_its_checkpoint_to_the_same_bits(digits, tmp_path):
    assert finish(start(pretrain_until_killed, tmp_path)) == -signal.SIGKILL
    assert {path.name.split(".")[0] for path in tmp_path.rglob("training-*")} == {"training-001-001"}
    stop = StopAfter(100)
    pool = pretrain(TINY, NARROW, digits, **ON_CPU, cache=tmp_path, stop=stop)
    assert stop.asked == 3 + 1  # steps: an epoch of one network, and the one that was not saved yet
    whole = pretrain(TINY, NARROW, digits, **ON_CPU, cache=tmp_path / "whole")
    assert torch.equal(pool.trajectory, whole.trajectory)
    assert not list(tmp_path.rglob("training-*"))


def pretrain_in_turn(cache, said, go_on=None):
    """Says when one network is trained, and waits then to go on, or when it waits for another process."""
    epochs = []

    def report(stage, done, total):
        epochs.append(done)
        if done == 3 and go_on:
            said.put("begun")
            go_on.get()

    warnings.showwarning = lambda message, *place: said.put(str(message))
    pretrain(TINY, NARROW, load_source("digits"), **ON_CPU, cache=cache, report=report)
    said.put(epochs)


@pytest.mark.parametrize("killed", [False, True])
def test_of_two_processes_that_need_the_same_networks_one_trains_each(digits, tmp_path, killed):
    said, go_on = context.SimpleQueue(), context.SimpleQueue()
    first = start(pretrain_in_turn, tmp_path, said, go_on)
    try:
        assert received(said, first) == "begun"
        second = start(pretrain_in_turn, tmp_path, said)
        assert received(said, second) == "pretrain, waiting for another process that does the same"
        if not killed:
            go_on.put(None)
            assert received(said, first) == [0, 1, 2, 2, 3, 4, 4]
            assert finish(first) == 0
    finally:
        first.kill()
    assert received(said, second) == ([2, 3, 4, 4] if killed else [4])
    assert finish(second) == 0
    pool = pretrain(TINY, NARROW, digits, **ON_CPU, cache=tmp_path, stop=StopRequest(0))
    whole = pretrain(TINY, NARROW, digits, **ON_CPU, cache=tmp_path / "whole")
    assert torch.equal(pool.trajectory, whole.trajectory)


def test_a_process_that_is_done_leaves_the_progress_of_the_others(digits, tmp_path):
    options = ON_CPU | {"cache": tmp_path}
    with pytest.raises(Stopped):
        train_pool(TINY, NARROW, digits, **options, share=(1, 2), stop=StopAfter(3))
    train_pool(TINY, NARROW, digits, **options, share=(0, 2))
    assert list(tmp_path.rglob("training-001-001*"))


def test_a_damaged_checkpoint_only_costs_its_training(digits, tmp_path):
    whole = pretrain(TINY, NARROW, digits, **ON_CPU, cache=tmp_path / "whole")
    with pytest.raises(Stopped):
        pretrain(TINY, NARROW, digits, **ON_CPU, cache=tmp_path, stop=StopAfter(3))
    (checkpoint,) = tmp_path.rglob("training-*")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    pool = pretrain(TINY, NARROW, digits, **ON_CPU, cache=tmp_path)
    assert torch.equal(pool.trajectory, whole.trajectory)


def test_a_finished_pool_leaves_no_checkpoints_but_those_of_a_larger_one(digits, tmp_path):
    together, larger = (dataclasses.replace(TINY, networks=count, at_once=2) for count in (2, 4))
    for config, times in ((larger, 6 + 3), (together, 0)):  # the first two networks, then half of two others
        with contextlib.suppress(Stopped):
            pretrain(config, NARROW, digits, **ON_CPU, cache=tmp_path, stop=StopAfter(times))
    assert [path.name for path in tmp_path.rglob("training-*")] == ["training-002-003.safetensors"]
    pretrain(dataclasses.replace(larger, at_once=1), NARROW, digits, **ON_CPU, cache=tmp_path)
    assert not list(tmp_path.rglob("training-*"))


def test_ranks_train_shares_that_together_are_the_pool_of_one_rank(digits, tmp_path):
    config = dataclasses.replace(TINY, networks=3, epochs=1)
    whole = pretrain(config, NARROW, digits, **ON_CPU, cache=tmp_path / "one")
    for rank, indices in ((0, [0, 2]), (1, [1])):
        share = train_pool(config, NARROW, digits, **ON_CPU, cache=tmp_path / "two", share=(rank, 2))
        assert torch.equal(torch.stack(share), whole.trajectory[indices])
    pool = pretrain(config, NARROW, digits, **ON_CPU, cache=tmp_path / "two", stop=StopAfter(0))
    assert torch.equal(pool.trajectory, whole.trajectory)


def test_a_network_of_the_pool_is_what_a_plain_loop_makes_of_it(digits, tmp_path):
    config = dataclasses.replace(TINY, epochs=6, learning_rate=0.05, snapshots=1)
    seed = seed_at(0, "pool", 1)
    network = build(NARROW, digits, seed)
    path = [parameters_to_vector(network.parameters()).detach()]
    loader = real_loader(digits, digits.train, 512, "cpu", augment="color_crop", seed=seed)
    descent = torch.optim.SGD(network.parameters(), 0.05, 0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(descent, [4, 5], 0.2)  # two thirds, five sixths
    for epoch in plain_epochs(network, loader, seed, descent, schedule, epochs=6):
        if epoch in (2, 5):
            path.append(parameters_to_vector(network.parameters()).detach())
    [trajectory] = train_pool(config, NARROW, digits, **ON_CPU, cache=tmp_path, share=(1, 2))
    assert torch.equal(trajectory, torch.stack(path))


def test_snapshots_are_the_weights_on_the_way_evenly_spaced_in_epochs(digits, tmp_path):
    config = dataclasses.replace(TINY, networks=1, epochs=6)
    options = ON_CPU | {"cache": tmp_path}
    none, two, five = (
        pretrain(dataclasses.replace(config, snapshots=number), NARROW, digits, **options).trajectory
        for number in (0, 2, 5)
    )
    assert torch.equal(two, five[:, [0, 2, 4, 6]])
    assert torch.equal(none, five[:, [0, 6]])
    assert not torch.equal(five[:, 3], five[:, 4])


@pytest.mark.parametrize("snapshots", [1, 4, 24])
def test_a_blend_passes_exactly_through_every_snapshot(pool, snapshots):
    path = torch.randn(2, snapshots + 2, pool.trained.shape[1])
    path[1, 1::2, :5] = 0  # from zero the smallest error shows
    pool = dataclasses.replace(pool, trajectory=path)
    network = FlatNetwork(pool.template, "cpu")
    for k in range(snapshots + 2):
        pool.blend(1, k / (snapshots + 1), network)
        assert torch.equal(network.weights, path[1, k])
    pool.blend(1, 0.5 / (snapshots + 1), network)
    assert torch.allclose(network.weights, (path[1, 0] + path[1, 1]) / 2, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, torch.tensor(0.7)])
def test_without_snapshots_a_blend_is_the_straight_line_bit_for_bit(pool, beta):
    network = FlatNetwork(pool.template, "cpu")
    pool.blend(1, beta, network)
    assert torch.equal(network.weights, torch.lerp(pool.trajectory[1, 0], pool.trained[1], beta))


def test_a_larger_pool_begins_with_the_networks_of_a_smaller_one(digits):
    larger = dataclasses.replace(TINY, networks=3)
    assert pool_key(larger, NARROW, digits, 0) == pool_key(TINY, NARROW, digits, 0)


@pytest.mark.parametrize(
    "change", [{"epochs": 3}, {"learning_rate": 0.2}, {"snapshots": 1}, {"precision": "bfloat16"}]
)
def test_everything_else_about_pretraining_has_a_cache_key_of_its_own(digits, change):
    other = dataclasses.replace(TINY, **change)
    assert pool_key(other, NARROW, digits, 0) != pool_key(TINY, NARROW, digits, 0)


def test_networks_that_saw_other_draws_are_not_taken_from_the_cache(digits, monkeypatch):
    key = pool_key(TINY, NARROW, digits, 0)
    monkeypatch.setattr("ncfm_engine.pretrain.DRAWS", 1)
    assert pool_key(TINY, NARROW, digits, 0) != key
    assert pool_key(TINY, NARROW, digits, 1) != pool_key(TINY, NARROW, digits, 0)
    changed = dataclasses.replace(digits, fingerprint="other")
    assert pool_key(TINY, NARROW, changed, 0) != pool_key(TINY, NARROW, digits, 0)


def test_running_statistics_are_refused_because_they_cannot_be_blended(digits, tmp_path):
    with pytest.raises(UsageError, match="cannot be blended"):
        pretrain(TINY, NetworkConfig(norm="batch", depth=2), digits, **ON_CPU, cache=tmp_path)


def test_a_pool_that_diverged_is_named_and_not_cached(digits, tmp_path):
    wild = dataclasses.replace(TINY, networks=1, epochs=3, learning_rate=1e30)
    with pytest.raises(DivergenceError, match=r"feature network 0 .* pretrain.learning_rate"):
        pretrain(wild, NARROW, digits, **ON_CPU, cache=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_one_network_that_diverged_does_not_cost_the_others(digits, tmp_path, monkeypatch):
    run = Training.run

    def diverge(training, *arguments, **options):
        run(training, *arguments, **options)
        training.networks.weights.data[0, 3] = float("nan")

    monkeypatch.setattr(Training, "run", diverge)
    config = dataclasses.replace(TINY, epochs=1, at_once=2)
    with pytest.raises(DivergenceError, match="feature network 0 "):
        pretrain(config, NARROW, digits, **ON_CPU, cache=tmp_path)
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["network-001.safetensors"]


@pytest.mark.parametrize(
    ("epochs", "milestones"), [(1, [6, 8]), (2, [13, 16]), (3, [20, 25]), (8, [50, 60]), (60, [400, 500])]
)
def test_the_rate_falls_late_however_few_epochs_there_are(epochs, milestones):
    assert _milestones(epochs, 10) == milestones


def test_pools_of_few_epochs_are_not_those_of_the_schedule_before(digits):
    """Which had the same settings: the keys of others stay as they were."""
    few, many = (dataclasses.replace(TINY, epochs=epochs) for epochs in (2, 30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncfm_engine.pretrain.FEW_EPOCHS", 0)
        before = [pool_key(config, NARROW, digits, 0) for config in (few, many)]
    assert pool_schedule(few)  # in the identity of a run as well, which would go on with other networks
    now = [pool_key(config, NARROW, digits, 0) for config in (few, many)]
    assert [one == other for one, other in zip(before, now, strict=True)] == [False, True]
