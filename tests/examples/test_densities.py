"""The examples of densities: a few steps each, and what they are measured by."""

import json
import math

import numpy as np
import pytest
import torch

import posterior
import tabular
from densities_2d import DENSITIES
from simulators import TASKS

SMALL = ["--steps", "6", "--width", "16", "--depth", "2"]


def record_of(out):
    return json.loads((out / "record.json").read_text())


def assert_pictures(out, *names):
    for name in names:
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_is_normalised_and_that_of_its_samples(name):
    density = DENSITIES[name]
    axis = torch.linspace(-8, 8, 1601)[:-1] + 0.005
    grid = torch.cartesian_prod(axis, axis)
    p = density.log_prob(grid).exp() * 1e-4
    assert p.sum().item() == pytest.approx(1, abs=2e-3)
    x = density.sample(20_000, torch.Generator().manual_seed(0))
    entropy = -(p * density.log_prob(grid)).nan_to_num().sum().item()
    assert -density.log_prob(x).mean().item() == pytest.approx(entropy, abs=0.03)
    mean = (p[:, None] * grid).sum(0)
    torch.testing.assert_close(x.mean(0), mean, atol=0.05, rtol=0)


@pytest.mark.parametrize("flow", ["spline-coupling", "maf", "spline-maf"])
def test_a_density_is_fitted_measured_and_drawn(flow, tmp_path, capsys):
    out = tmp_path / "run"
    tabular.main(["--out", str(out), "--flow", flow, "--points", "500", *SMALL])
    record = record_of(out)
    assert record["config"]["flow"] == flow
    assert math.isfinite(record["log_likelihood"])
    assert 0 < record["kl"] < 3
    assert_pictures(out, "density.png", "samples.png")
    assert "step      6/6" in capsys.readouterr().out


def test_a_flow_that_is_trained_longer_is_nearer(tmp_path):
    divergences = []
    for steps in ("5", "120"):
        flags = ["--data", "banana", "--points", "2000", "--batch-size", "256", "--lr", "0.01"]
        tabular.main(["--out", str(tmp_path), *SMALL, *flags, "--steps", steps])
        divergences.append(record_of(tmp_path)["kl"])
    assert divergences[1] < divergences[0] / 2


def table(rows=60):
    x = np.random.default_rng(0).normal(size=(rows, 3))
    x[:, 2] = 10 * x[:, 0] + x[:, 2] + 100
    return x


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_of_a_table_are_modelled_given_others(kind, tmp_path):
    path = tmp_path / f"table.{kind}"
    if kind == "csv":
        np.savetxt(path, table(), delimiter=",", header="a,b,c", comments="")
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow = pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.table(dict(zip("abc", table().T, strict=True))), path)
    for flags in ([], ["--condition-on", "a"], ["--condition-on", "a", "b", "--flow", "maf"]):
        tabular.main(["--out", str(tmp_path), "--data", str(path), *SMALL, *flags])
        record = record_of(tmp_path)
        assert math.isfinite(record["log_likelihood"])
        assert "kl" not in record
        assert_pictures(tmp_path, "samples.png")


def test_the_likelihood_of_a_table_is_that_of_its_own_units(tmp_path):
    found = []
    for scale in (1, 1000):
        path = tmp_path / "table.csv"
        np.savetxt(path, table() * scale, delimiter=",", header="a,b,c", comments="")
        tabular.main(["--out", str(tmp_path), "--data", str(path), *SMALL])
        found.append(record_of(tmp_path)["log_likelihood"])
    assert found[1] - found[0] == pytest.approx(-3 * math.log(1000), abs=1e-2)


@pytest.mark.parametrize(
    ("content", "flags", "says"),
    [
        (None, [], "is no file and none of the densities mixture, rings"),
        ("a,b\n" + "1,2\n" * 30, [], "a column is constant"),
        ("a,b\n" + "1,2\n3,\n" * 30, [], "has missing values or no numbers in b"),
        ("a,b\n1,2\n3,4\n", [], "2 rows are too few"),
        ("a,b\n" + "1,2\n3,4\n" * 30, ["--condition-on", "c"], "no column c in a, b"),
        ("a,b\n" + "1,2\n3,4\n" * 30, ["--condition-on", "a"], "too few columns are left"),
    ],
)
def test_a_table_that_has_no_density_is_refused(content, flags, says, tmp_path):
    path = tmp_path / "table.csv"
    if content:
        path.write_text(content)
    with pytest.raises(SystemExit, match=says):
        tabular.main(["--out", str(tmp_path), "--data", str(path), *SMALL, *flags])


@pytest.mark.parametrize("name", TASKS)
def test_the_posterior_of_a_simulator_is_that_of_its_samples(name):
    """Its log-density at its samples has the mean that it has at those of prior and simulator."""
    task = TASKS[name]()
    theta, x = task.pairs(2000)
    log_posterior = task.log_posterior(theta, x)
    drawn = task.sample_posterior(2000, x[0])
    given = x[:1].expand(2000, -1)
    entropies = [
        -task.log_posterior(task.sample_posterior(500, o), o.expand(500, -1)).mean() for o in x[:50]
    ]
    assert task.log_posterior(drawn, given).isfinite().all()
    expected = -log_posterior.mean()
    torch.testing.assert_close(torch.stack(entropies).mean(), expected, atol=0.15, rtol=0)


def test_the_crescents_of_two_moons_are_normalised():
    task = TASKS["two-moons"]()
    axis = torch.linspace(-1, 1, 2001)[:-1] + 0.0005
    grid = torch.cartesian_prod(axis, axis)
    p = task.log_posterior(grid, torch.zeros(1, 2)).exp() * 1e-6
    assert p.sum().item() == pytest.approx(1, abs=1e-2)
    drawn = task.sample_posterior(20_000, torch.zeros(2))
    mean = (p[:, None] * grid.abs()).sum(0)
    torch.testing.assert_close(drawn.abs().mean(0), mean, atol=1e-2, rtol=0)


@pytest.mark.parametrize("task", TASKS)
def test_a_posterior_is_learned_compared_and_drawn(task, tmp_path):
    flags = ["--task", task, "--observations", "1", "--samples", "60", "--batch-size", "64"]
    posterior.main(["--out", str(tmp_path), *flags, *SMALL])
    record = record_of(tmp_path)
    assert record["kl"] > 0
    assert 0.3 < record["c2st"] <= 1
    assert len(record["calibration"]) == TASKS[task].parameters
    assert_pictures(tmp_path, "posterior.png", "calibration.png")


def test_the_true_posterior_is_calibrated_and_not_told_from_itself():
    task = TASKS["linear-gaussian"]()

    class Truth:
        def sample(self, shape, x):
            return task.posterior(x).sample(shape)

    excess = posterior.calibration(Truth(), task, 500)
    assert excess.abs().max() < 1.63 / math.sqrt(500)
    theta = task.sample_posterior(400, torch.zeros(5))
    assert posterior.c2st(theta[:200], theta[200:], 0) == pytest.approx(0.5, abs=0.1)
    assert posterior.c2st(theta[:200], theta[200:] + 5, 0) > 0.95
