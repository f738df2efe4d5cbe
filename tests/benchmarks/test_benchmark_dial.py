"""The benchmark of the dial runs. No times: those are for reading."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import dial


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("dial") / "new" / "dial"
    small = {"blocks": 2, "batch": 2, "channels": 8, "width": 8, "device": "cpu", "seconds": 0.0}
    dial.main(dial.Config(sides=(4,), tokens=(6,), out=out, **small))
    assert out.with_suffix(".png").stat().st_size
    return json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".txt").read_text()


def test_what_is_held_goes_down_with_the_dial(found):
    numbers, text = found
    assert list(numbers["sizes"]) == ["bottlenecks, 4x4", "transformers, 6 tokens"]
    for size in numbers["sizes"].values():
        rows = {name: row["memory"]["held"] for name, row in size["rows"].items()}
        assert rows["rebuilt"] < rows["dearest products kept"] < rows["all products kept"]
        assert rows["dearest products kept"] < rows["plain"]
    assert "A training step of 2 blocks" in text
