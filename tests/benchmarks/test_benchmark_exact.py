"""The benchmark of exact mode runs, and finds zeros where the library promises them."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import exact
import exact_accuracy
import exact_cost
import exact_drift
import exact_networks
from comparing.sides import quiet_peers
from comparing.stacks import Stack

SMALL = exact_drift.Blocks(depth=20, batch=2, width=8, side=4)


@pytest.fixture(autouse=True)
def _keep_threads():
    threads = torch.get_num_threads()
    with quiet_peers():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["float32", "f under bfloat16 autocast"])
def test_exact_mode_has_no_drift_and_float_mode_has(precision):
    method, other = (exact_drift.METHODS[name] for name in (exact_drift.EXACT, "invertible"))
    found = exact_drift.errors(SMALL, method, exact_drift.PRECISIONS[precision], seed=0)
    assert found == (0, 0, True)
    found = exact_drift.errors(SMALL, other, exact_drift.PRECISIONS[precision], seed=0)
    assert found.reconstruction > 0 < found.gradient
    assert found.same_output


@pytest.mark.filterwarnings("ignore:.*is rebuilt from a state in torch.bfloat16:UserWarning")
def test_a_state_in_bfloat16_drifts_far():
    precision = exact_drift.PRECISIONS["all bfloat16"]
    found = exact_drift.errors(SMALL, exact_drift.METHODS["invertible"], precision, seed=0)
    assert found.reconstruction > 1e-3
    assert found.gradient > 1e-2


@pytest.mark.parametrize("name", ["memcnn", "revtorch"])
def test_a_peer_is_compared_with_its_own_stored_activations(name):
    pytest.importorskip(name)
    method = {key.lower(): method for key, method in exact_drift.METHODS.items()}[name]
    for precision in exact_drift.PRECISIONS.values():
        assert exact_drift.errors(SMALL, method, precision, seed=0).same_output
    found = exact_drift.errors(SMALL, method, exact_drift.PRECISIONS["float32"], seed=0)
    assert 0 < found.reconstruction < 1e-4
    assert found.gradient < 1e-2


def test_a_method_that_fails_is_named_with_the_reason(monkeypatch):
    def broken(_):
        raise OSError("out of order")

    methods = exact_drift.METHODS | {
        "RevTorch": exact_drift.METHODS["RevTorch"]._replace(network=broken)
    }
    monkeypatch.setattr(exact_drift, "METHODS", methods)
    rows = list(exact_drift.measure(SMALL, {"MemCNN"}, seeds=1))
    assert {row.failed for row in rows if row.method == "RevTorch"} == {"OSError: out of order"}
    assert all(row.method != "MemCNN" for row in rows)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_grid_cures_the_cifar_network(autocast):
    case = exact_networks.Case("cifar10", 2, 32, exact_networks.QUANTUM, autocast)
    found = exact_networks.measure(case, seed=0)
    assert found.train_error == found.eval_error == found.gradient_error == 0
    assert found.images_equal == 2
    assert found.gradients_equal == found.gradients
    assert found.buffers_equal


def test_the_cifar_network_needs_a_cure():
    found = exact_networks.measure(exact_networks.Case("cifar10", 2, 32, None), seed=0)
    assert found.train_error > 0.1
    assert found.eval_error < 1e-6
    assert found.gradient_error > 1e-3
    assert found.buffers_equal


def test_rounding_is_timed_both_ways():
    found = exact_cost.measure(Stack(depth=2, batch=1, width=4, side=4), seconds=0)
    assert found.steps.keys() == exact_cost.KINDS.keys()
    assert found.stored.low > 0 < found.rebuilt.low


def test_training_with_rounding_draws_what_training_without_draws():
    task = exact_accuracy.digits_task(epochs=1)
    data = task.data()
    for part, images in zip(data, (128, 64), strict=True):
        part.order = replace(part.order, indices=np.arange(images))
    a, b = (exact_accuracy.train(task, data, side, seed=0) for side in exact_accuracy.SIDES)
    assert a.losses[0] == pytest.approx(b.losses[0], rel=1e-2)
    assert a.losses != b.losses


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (exact.Drift(depths=(2, 4), batch=1, width=4, side=4, seeds=1), "4 blocks"),
        (exact.Networks(presets=("digits",), seeds=1), "16 of 16"),
        (exact.Cost(depth=2, batch=1, sizes=((4, 4),), seconds=0), "4 channels, 4x4"),
    ],
    ids=["drift", "irevnet", "cost"],
)
def test_a_command_prints_and_writes_all_it_measures(config, expected, tmp_path, capsys):
    exact.main(replace(config, device="cpu", out=tmp_path / "new" / "result"))
    about = json.loads((tmp_path / "new" / "result.json").read_text())["about"]
    assert about["threads"] == 1
    assert "out" not in about["config"]
    assert expected in (tmp_path / "new" / "result.txt").read_text()
    assert expected in capsys.readouterr().out


def test_accuracy_is_summed_up_over_the_seeds():
    runs = [
        exact_accuracy.Outcome(side, seed, accuracy, [])
        for side, values in (("not rounded", (0.8, 0.9)), ("rounded", (0.7, 0.9)))
        for seed, accuracy in enumerate(values)
    ]
    found = exact_accuracy.summarise(runs)
    assert found["not rounded"].mean == pytest.approx(0.85)
    assert found["rounded"].low == 0.7
    assert found["rounded - not rounded"].mean == pytest.approx(-0.05)
