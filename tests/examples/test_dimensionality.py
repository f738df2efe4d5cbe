import json

import pytest

import dimensionality
from analyses import probes
from dimensionality import dimensions


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [1]), (5, [1, 2, 5]), (12, [1, 2, 5, 10, 12]), (200, [1, 2, 5, 10, 20, 50, 100, 200])],
)
def test_dimensions_rise_to_all(count, expected):
    assert dimensions(count) == expected


@pytest.mark.slow
def test_it_probes_the_components_of_the_last_features(digits_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probes, "COSTS", (0.01,))
    flags = ["--weights", str(digits_run), "--train-limit", "300", "--test-limit", "100"]
    assert dimensionality.main([*flags, "--threads", "1", "--out", str(tmp_path)]) == 0
    assert "of the variance" in capsys.readouterr().out
    (network,) = json.loads((tmp_path / "dimensionality.json").read_text())["networks"]
    points = network["points"]
    assert [point["components"] for point in points] == [1, 2, 5, 10, 20, 50, 100, 200, 256]
    assert points[-1]["of the variance"] == pytest.approx(1)
    one, _, _, _, twenty, *_, every = (point["svm"]["accuracy"] for point in points)
    assert one < 0.9 * twenty
    assert twenty > 0.8 * every  # the first components hold the classes, not the last
    for ending in ("png", "pdf"):
        assert (tmp_path / f"dimensionality.{ending}").stat().st_size > 1000
