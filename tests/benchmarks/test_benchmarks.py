"""The benchmarks run, and their meters measure what they say. No times: those are for reading."""

import importlib.util
import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from comparing.meters import (
    Memory,
    Spread,
    Times,
    interleave,
    measure_memory,
    total_error,
    worst_error,
)
from comparing.networks import Workload, largest_that, measure
from comparing.setting import Setting
from comparing.sides import OURS, PLAIN, SIDES, importable_sides, plain, quiet_peers
from comparing.stacks import (
    Comparison,
    Row,
    Stack,
    check,
    compare_stack,
    gradients_held,
    growth,
)

SMALL = Stack(depth=4, batch=2, width=8, side=8)


@pytest.fixture(autouse=True)
def _quiet_peers():
    with quiet_peers():
        yield


def test_the_allocator_counts_what_the_graph_of_plain_training_holds():
    fs = SMALL.functions()
    step = SMALL.step(fs)
    storages = {}

    def note(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        y = step.forward(plain(fs))
    for known in (step.x, *fs.parameters(), *fs.buffers()):
        storages.pop(known.untyped_storage().data_ptr(), None)
    memory = measure_memory(step, plain(fs))
    assert memory.held == sum(storages.values()) + y.nbytes
    assert memory.peak > memory.held
    assert memory.left == 0


def test_rebuilding_holds_the_same_at_every_depth():
    large = replace(SMALL, batch=64)  # beside which a layer's samples, a kilobyte, are nothing
    by_depth = {
        depth: compare_stack(replace(large, depth=depth), SIDES, seconds=0) for depth in (4, 20)
    }
    grown = growth(by_depth)
    assert grown[PLAIN].share_of_plain == 1
    assert 0.1 < grown["checkpoint, blocks"].share_of_plain < 0.9
    assert grown[OURS].share_of_plain < 0.02
    assert grown[OURS].held_ratio < 1.1


def test_a_step_evaluates_each_function_twice_and_is_otherwise_plain():
    checks = check(SMALL, SIDES)
    assert checks[PLAIN].evaluations == 1
    assert checks[PLAIN].float32 == checks[PLAIN].float64 == 0 < checks[PLAIN].float32_exact
    assert checks[OURS].evaluations == 2
    assert checks[OURS].float64 < 1e-12
    assert checks[OURS].statistics
    assert checks[OURS].batches == 1
    # What the comparison is meant to show: torch's own runs BatchNorm twice.
    assert checks["checkpoint, blocks"].batches == 2
    assert not checks["checkpoint, blocks"].statistics


def test_every_side_that_can_run_computes_the_same():
    fs = SMALL.functions().double()
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64, requires_grad=True)
    expected = plain(fs)(x)
    for side in importable_sides()[0].values():
        torch.testing.assert_close(side(list(fs))(x.view_as(x)), expected)


@pytest.mark.parametrize("package", ["memcnn", "revtorch", "revlib"])
def test_a_peer_that_is_missing_is_skipped_with_a_reason(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    sides, skipped = importable_sides()
    reasons = [why for name, why in skipped.items() if name.lower().startswith(package)]
    assert reasons
    assert all(package in why for why in reasons)
    assert not sides.keys() & skipped.keys()


class _AllAtOnce(torch.autograd.Function):
    """Gradients of all parameters in one piece: what must not happen."""

    @staticmethod
    def forward(ctx, x, fs, *parameters):
        ctx.save_for_backward(x, *parameters)
        ctx.fs = fs
        return plain(fs)(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            gradients = torch.autograd.grad(
                plain(ctx.fs)(x), (x, *ctx.saved_tensors[1:]), grad_outputs=grad
            )
        return gradients[0], None, *gradients[1:]


def test_gradients_that_wait_for_each_other_are_seen():
    def all_at_once(fs):
        return lambda x: _AllAtOnce.apply(x, fs, *(p for f in fs for p in f.parameters()))

    heavy = Stack(depth=6, batch=1, width=64, side=2)
    held = gradients_held(heavy, {OURS: SIDES[OURS], "all at once": all_at_once})
    assert held[OURS] < 2
    assert held["all at once"] > 6


def test_every_round_runs_all_tasks_in_another_order():
    done = []
    tasks = {name: partial(done.append, name) for name in "abcd"}
    results = interleave(tasks, seconds=0, min_rounds=10)
    assert [len(times) for times in results.values()] == [10] * 4
    warm, *rounds = (done[i : i + 4] for i in range(0, len(done), 4))
    assert warm == list("abcd")
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len({tuple(order) for order in rounds}) > 3


def test_the_cpu_clock_leaves_out_what_others_take():
    wall, cpu = Setting(clock="wall"), Setting(clock="cpu")
    before = wall.now(), cpu.now()
    time.sleep(0.2)
    assert wall.now() - before[0] >= 0.2 > 0.1 > cpu.now() - before[1]


def test_ours_is_held_against_the_better_peer_of_each_round():
    def row(*steps):
        times = [Times(0.0, step) for step in steps]
        return Row(Spread.of(steps), Spread(1, 1, 1), Spread(1, 1, 1), Memory(0, 0, 0), times)

    rows = {OURS: row(2.0, 2.0), "RevTorch": row(1.0, 2.0), "revlib, function": row(2.0, 4.0)}
    found = Comparison(1, rows).over_peers
    assert {name: ratio.median for name, ratio in found.items()} == {
        "RevTorch": 1.5,
        "revlib, function": 0.75,
        "the better": 1.5,
    }
    assert Comparison(1, {OURS: row(1.0, 1.0)}).over_peers == {}


def test_errors_are_relative():
    a, b = torch.ones(4), torch.full((4,), 10.0)
    assert worst_error([1.1 * a, b], [a, b]) == pytest.approx(0.1)
    assert total_error([1.1 * a, b], [a, b]) == pytest.approx(0.2 / 404**0.5)


def test_a_whole_network_is_measured():
    found = measure(Workload("digits", batch=4, side=32), Setting(), seconds=0)
    held = {name: row.memory.held for name, row in found.comparison.rows.items()}
    assert held[OURS] < held["checkpoint, layers"] < held[PLAIN]
    assert found.errors["checkpoint, layers"] == 0


@pytest.mark.parametrize("limit", [0, 1, 2, 9, 100, 1000])
def test_the_largest_batch_is_found_to_three_percent(limit):
    assert 0.96 * limit <= largest_that(lambda batch: batch <= limit) <= limit


def test_the_command_prints_and_writes_all_it_measures(tmp_path, capsys, monkeypatch):
    command = _command()
    sides = {name: SIDES[name] for name in (PLAIN, OURS)}
    monkeypatch.setattr(command, "importable_sides", lambda: (sides, {"MemCNN": "not here"}))
    config = command.Config(
        depths=(2, 4),
        batch=1,
        width=4,
        side=4,
        other_sides=(8,),
        seconds=0,
        threads=torch.get_num_threads(),
        device="cpu",
        out=tmp_path / "new" / "result",
    )
    command.main(config)
    found = json.loads((tmp_path / "new" / "result.json").read_text())
    assert found["about"]["config"]["depths"] == [2, 4]
    assert len(found["depths"]["4"]["rows"][OURS]["times"]) >= 3
    assert (tmp_path / "new" / "result.png").stat().st_size > 0
    assert found["sizes"]["8x8"]["rows"][OURS]["over_plain"]["median"] > 0
    printed = capsys.readouterr().out
    assert "4 blocks" in printed
    assert "skipped MemCNN: not here" in printed
    assert printed.index("over plain") < printed.index("over the limit")
    assert "the limit" in printed[printed.index("Time of a step over plain") :]


def test_the_cpu_clock_is_refused_where_it_would_mislead(tmp_path):
    command = _command()
    config = command.Config(clock="cpu", threads=2, device="cpu", out=tmp_path / "result")
    with pytest.raises(SystemExit, match="one thread on a CPU"):
        command.main(config)


def _command():
    # Under a name of its own: tests/checkpointing.py has the plain one.
    path = Path(__file__).parents[2] / "benchmarks" / "checkpointing.py"
    spec = importlib.util.spec_from_file_location("checkpointing_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
