"""The benchmark of compiled networks runs. No times: those are for reading."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import compiled
import pytest
import torch
from comparing.sides import PLAIN


# Dynamo warns of what it does itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@pytest.mark.skipif(torch.__version__ < (2, 13), reason="older compilers can't trace what rebuilds")
def test_each_side_is_measured_and_rebuilding_holds_less(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "FAST_PEERS", ())
    config = compiled.Config(
        blocks=2, batch=2, width=4, sides=(4,), depths=(4,), seconds=0.1, backend="aot_eager",
        out=tmp_path / "compiled",
    )  # fmt: skip
    compiled.main(config)
    found = json.loads((tmp_path / "compiled.json").read_text())
    rows = found["sizes"]["4"]["rows"]
    assert rows[PLAIN]["over_plain"]["median"] == 1
    assert rows[compiled.OURS]["memory"]["held"] < rows[PLAIN]["memory"]["held"]
    assert found["first steps"]["4"][compiled.OURS]["seconds"] > 0
    assert "stored, compiled" in capsys.readouterr().out
