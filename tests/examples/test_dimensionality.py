import json

import pytest
import torch

import dimensionality
from analyses import linear_svm
from analyses.probes import Samples, nearest_neighbour
from dimensionality import dimensions, find_components


@pytest.fixture
def clouds():
    """Standardised samples of dependent features."""
    torch.manual_seed(0)
    x = torch.randn(200, 10) @ torch.randn(10, 10)
    return (x - x.mean(0)) / x.std(0)


def test_components_are_orthogonal_and_in_falling_order_of_variance(clouds):
    found = find_components(clouds)
    variance = (clouds @ found.axes).var(0)
    torch.testing.assert_close(found.axes.T @ found.axes, torch.eye(10), rtol=0, atol=1e-5)
    torch.testing.assert_close(variance / variance.sum(), found.variance.float())
    assert (variance.diff() <= 0).all()


def test_all_components_together_leave_the_nearest_neighbours(clouds):
    train, test = clouds.split([150, 50])
    axes = find_components(train - train.mean(0)).axes
    found = nearest_neighbour(Samples(train @ axes, torch.arange(150)), test @ axes)
    assert torch.equal(found, nearest_neighbour(Samples(train, torch.arange(150)), test))


def test_classes_that_lie_on_a_line_are_held_by_one_component():
    torch.manual_seed(0)
    labels = torch.arange(90) % 3
    x = (labels[:, None] - 1.0) * torch.randn(1, 6) * 10 + torch.randn(90, 6)
    first = x @ find_components(x).axes[:, :1]
    assert torch.equal(nearest_neighbour(Samples(first[:60], labels[:60]), first[60:]), labels[60:])


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [1]), (5, [1, 2, 5]), (12, [1, 2, 5, 10, 12]), (200, [1, 2, 5, 10, 20, 50, 100, 200])],
)
def test_dimensions_rise_to_all(count, expected):
    assert dimensions(count) == expected


def test_it_probes_the_components_of_the_last_features(digits_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(linear_svm.choose_cost.__kwdefaults__, "costs", (0.01,))
    flags = ["--weights", str(digits_run), "--train-limit", "300", "--test-limit", "100"]
    assert dimensionality.main([*flags, "--threads", "1", "--out", str(tmp_path)]) == 0
    assert "of the variance" in capsys.readouterr().out
    (network,) = json.loads((tmp_path / "dimensionality.json").read_text())["networks"]
    points = network["points"]
    assert [point["components"] for point in points] == [1, 2, 5, 10, 20, 50, 100, 200, 256]
    assert points[-1]["of the variance"] == pytest.approx(1)
    assert points[-1]["svm"]["accuracy"] > points[0]["svm"]["accuracy"]
    for ending in ("png", "pdf"):
        assert (tmp_path / f"dimensionality.{ending}").stat().st_size > 1000
