"""The benchmark of densities runs, with and without peers. No times: those are for reading."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import densities
import densities_learning


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("densities") / "new" / "densities"
    few = {"seeds": 2, "digit_steps": 3, "moon_steps": 3, "depth": 1, "width": 8, "batch": 16}
    small = {"error_depths": (1, 2), "factors": (1, 3), "depths": (1, 2), "size": 16, "hidden": 8}
    densities.main(densities.Config(out=out, **few, **small))
    return json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".txt").read_text()


def test_each_side_learns_each_task_from_each_seed(found):
    numbers, text = found
    assert set(numbers["learning"]) == {"digits", "moons"}
    for rows in numbers["learning"].values():
        assert "ours" in rows
        for row in rows.values():
            assert len(row["log_likelihood"]) == 2
            assert all(map(math.isfinite, row["log_likelihood"]))
    assert "Log-likelihood of test examples" in text


def test_our_errors_are_small_where_weights_are_not_multiplied(found):
    numbers, text = found
    own = [row for row in numbers["errors"] if row["side"] == "ours"]
    assert len(own) == 2 * 2 * 2 * 2
    for row in own:
        if row["factor"] == 1 and row["dtype"] == "float32":
            assert row["round_trip"] < 1e-4
            assert row["log_det"] < 1e-3
    assert "Errors of a round trip" in text


def test_memory_is_that_of_stored_and_rebuilt_activations(found):
    numbers, text = found
    for ways in numbers["memory"].values():
        assert ways["rebuilt"]["held"] < ways["stored"]["held"]
    assert "Memory of Glow, 2 images of 16x16" in text


def test_what_begins_from_a_batch_is_as_likely_as_a_normal():
    train, test = densities_learning.moons()
    density = densities_learning.ours("spline", 1, 8, (2,))
    densities_learning.begin(density, train[:512])
    entropy = -1.4189  # of a standard normal, which the data are scaled like
    assert densities_learning.log_likelihood(density, test) == pytest.approx(entropy, abs=0.05)
