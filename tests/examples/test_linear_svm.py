"""The SVM against scikit-learn's, which is the slow and plain way."""

import pytest
import torch
from sklearn.svm import LinearSVC
from torch.nn import functional as F

from analyses.linear_svm import choose_cost, fit_svm


def samples(count=300, features=8, classes=3, distance=1.0, seed=0):
    """Clouds around a mean for each class, nearer than they are wide."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    means = distance * torch.randn(classes, features, generator=generator)
    return means[labels] + torch.randn(count, features, generator=generator), labels


def objective(weights, x, labels, cost):
    x, sides = F.pad(x, (0, 1), value=1.0).double(), 2 * F.one_hot(labels) - 1
    violations = (1 - sides * (x @ weights.double())).clamp(min=0)
    return (weights.square().sum() / 2 + cost * violations.square().sum()).item()


@pytest.mark.parametrize("cost", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("distance", [0.3, 10.0])
def test_it_finds_the_minimum_that_scikit_learn_finds(distance, cost):
    x, labels = samples(distance=distance)
    oracle = LinearSVC(C=cost, dual=False, tol=1e-8).fit(x, labels)
    svm = fit_svm(x, labels, 3, cost)
    expected = torch.from_numpy(oracle.coef_.T), torch.from_numpy(oracle.intercept_)[None]
    least = objective(torch.cat(expected), x, labels, cost)
    at_zero = cost * len(x) * 3
    found = objective(svm.weights, x, labels, cost)
    assert found == pytest.approx(least, rel=1e-4, abs=1e-7 * at_zero)
    agreement = (svm.predict(x) == torch.from_numpy(oracle.predict(x))).float().mean()
    assert agreement > 0.99
    assert svm.converged


def test_features_that_depend_on_each_other_do_not_stop_it():
    x, labels = samples()
    x = x @ torch.randn(8, 100, generator=torch.Generator().manual_seed(1))
    assert (fit_svm(x, labels, 3, 1000.0).predict(x) == labels).float().mean() > 0.7


def test_it_tells_when_it_did_not_converge():
    assert not fit_svm(*samples(), 3, 1.0, max_iterations=2).converged


def test_a_class_without_samples_is_never_predicted():
    x, labels = samples()
    assert fit_svm(x, labels, 4, 1.0).predict(x).max() == 2


def test_of_equally_good_costs_the_lowest_is_chosen():
    assert choose_cost(*samples(), 3, costs=[1.0, 1.0 + 1e-9]) == 1.0


def test_a_high_cost_is_chosen_where_it_helps():
    # So low a cost leaves the hyperplanes at the classes' frequencies.
    x, labels = samples(count=200, classes=2, distance=1.0)
    rare = (labels == 0) | (torch.arange(200) < 20)
    assert choose_cost(x[rare], labels[rare], 2, costs=[1e-7, 1.0]) == 1.0


def test_the_seed_decides_the_folds(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "analyses.linear_svm._cross_validated", lambda *args: seen.append(args[4]) or 0
    )
    for seed in (0, 0, 1):
        choose_cost(*samples(), 3, costs=[1.0], seed=seed)
    first, second, third = (torch.cat(folds) for folds in seen)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(first.sort().values, torch.arange(300))
