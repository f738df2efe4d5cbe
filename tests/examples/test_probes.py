import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from analyses import probes
from analyses.probes import Accuracy, Samples, nearest_neighbour, probe, standardised


def clouds(distance, count=240, classes=4, features=12):
    """Training and test samples of classes whose means are so far apart."""
    labels = torch.arange(count) % classes
    means = distance * torch.eye(classes, features)
    return [Samples(means[labels] + torch.randn(count, features), labels) for _ in range(2)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_both_read_separable_classes_without_error():
    found = probe(*clouds(distance=20.0), 4)
    assert found.svm == found.nearest == Accuracy(1.0, 240)
    assert found.converged


def test_both_are_at_chance_on_noise():
    found = probe(*clouds(distance=0.0), 4)
    for share in (found.svm, found.nearest):
        low, high = share.interval(z=3)
        assert low < 1 / 4 < high


def test_the_nearest_neighbour_is_that_of_scikit_learn():
    train, test = clouds(distance=1.0, count=700)
    oracle = KNeighborsClassifier(n_neighbors=1, algorithm="brute").fit(train.x, train.labels)
    expected = torch.from_numpy(oracle.predict(test.x))
    assert torch.equal(nearest_neighbour(train, test.x), expected)


def test_standardising_is_that_of_scikit_learn():
    train, test = 3 * torch.randn(50, 4) + 2, torch.randn(20, 4)
    scaler = StandardScaler().fit(train)
    bessel = (49 / 50) ** 0.5
    for found, x in zip(standardised(train, test), (train, test), strict=True):
        expected = torch.from_numpy(scaler.transform(x)).float() * bessel
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_feature_that_is_constant_in_training_is_shifted_only():
    train = torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 6.0]])
    found, test = standardised(train, torch.tensor([[0.6, 3.0]]))
    torch.testing.assert_close(found[:, 0], torch.zeros(3), rtol=0, atol=1e-7)
    torch.testing.assert_close(test, torch.tensor([[0.5, 0.0]]))


def test_the_cost_is_chosen_among_samples_from_everywhere(monkeypatch):
    train, test = clouds(distance=20.0)
    order = train.labels.argsort()
    monkeypatch.setattr(probes, "CHOICE", 40)
    seen = []
    monkeypatch.setattr(
        "analyses.probes.choose_cost", lambda *args, **_: seen.append(args[1]) or 1.0
    )
    probe(Samples(train.x[order], train.labels[order]), test, 4)
    assert seen[0].bincount().tolist() == [10] * 4


def test_an_interval_holds_the_true_share_in_95_percent_of_cases():
    counts = torch.distributions.Binomial(360, torch.full((2000,), 0.97)).sample()
    intervals = [Accuracy(count / 360, 360).interval() for count in counts.tolist()]
    held = sum(low <= 0.97 <= high for low, high in intervals) / 2000
    assert held == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("images", [1, 3, 360, 10_000])
def test_an_interval_holds_what_was_found_and_stays_within_0_and_1(share, images):
    low, high = Accuracy(share, images).interval()
    assert 0 <= low <= share <= high <= 1
    assert high - low > 0
