"""The benchmark of flows runs, with and without peers. No times: those are for reading."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import flows


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("flows") / "new" / "flows"
    small = {"image_batch": 2, "vector_batch": 4, "width": 8, "seconds": 0.0}
    flows.main(flows.Config(depths=(1, 3), out=out, **small))
    return json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".txt").read_text()


def test_each_depth_has_a_row_for_each_side(found):
    numbers, text = found
    for kind in ("glow", "spline"):
        assert list(numbers[kind]) == ["1", "3"]
        for rows in numbers[kind].values():
            assert {"stored", "rebuilt"} <= set(rows)
    assert "A training step of glow flows" in text
    assert "A training step of spline flows" in text


def test_our_memory_is_flat_and_each_sub_network_is_evaluated_once_more(found):
    numbers, _ = found
    for kind in ("glow", "spline"):
        one, three = (numbers[kind][depth] for depth in ("1", "3"))
        grown = {side: three[side]["held"] - one[side]["held"] for side in ("stored", "rebuilt")}
        assert grown["rebuilt"] < grown["stored"] / 2
        for rows in (one, three):
            assert rows["stored"]["evaluations"] == 1
            assert rows["rebuilt"]["evaluations"] == 2


def test_gradients_and_log_likelihoods_are_those_of_float64(found):
    numbers, _ = found
    for kind in ("glow", "spline"):
        for rows in numbers[kind].values():
            for side in ("stored", "rebuilt"):
                assert rows[side]["gradient_error"] < 1e-2
                assert rows[side]["log_likelihood_error"] < 1e-2
