"""The benchmark of transformers runs. No times: those are for reading."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import reversible_transformers as benchmark


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("transformers") / "new" / "transformers"
    small = {"width": 8, "batch": 2, "seconds": 0.0, "losses": 3, "device": "cpu"}
    benchmark.main(benchmark.Config(depths=(2, 4), lengths=(4, 6), out=out, **small))
    return json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".txt").read_text()


def test_our_memory_is_flat_and_that_of_checkpointing_is_not(found):
    numbers, text = found
    assert list(numbers["sizes"]) == ["2, 4", "4, 4", "2, 6"]
    few, many = (numbers["sizes"][size]["rows"] for size in ("2, 4", "4, 4"))
    grown = {name: many[name]["memory"]["held"] - few[name]["memory"]["held"] for name in few}
    for name in ("invertible", "invertible, exact"):
        assert grown[name] < 0.5 * grown["plain"]
    assert grown["checkpoint, blocks"] > 0
    assert "A training step of transformers 8 wide" in text


def test_losses_on_a_grid_are_the_same_bit_for_bit(found):
    numbers, text = found
    assert numbers["losses"]["stored"] == numbers["losses"]["rebuilt"]
    assert "3 of 3 losses are the same" in text
