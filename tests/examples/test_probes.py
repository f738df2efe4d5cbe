import numpy as np
import pytest

from analyses import probes
from analyses.probes import Accuracy, Samples, choose_cost, probe


def clouds(distance, count=240, classes=4, features=12):
    """Training and test samples of classes whose means are so far apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    means = distance * np.eye(classes, features)
    x = (means[labels] + rng.standard_normal((count, features)) for _ in range(2))
    return [Samples(each.astype(np.float32), labels) for each in x]


def test_both_read_separable_classes_without_error():
    found = probe(*clouds(distance=20.0))
    assert found.svm == found.nearest == Accuracy(1.0, 240)


def test_both_are_at_chance_on_noise():
    found = probe(*clouds(distance=0.0))
    for share in (found.svm, found.nearest):
        low, high = share.interval(z=3)
        assert low < 1 / 4 < high


def test_only_the_nearest_neighbour_reads_classes_that_no_plane_parts():
    rng = np.random.default_rng(0)
    place = np.arange(90) % 3
    train, test = (
        Samples((10 * place + rng.random(90))[:, None].astype(np.float32), place % 2)
        for _ in range(2)
    )
    found = probe(train, test)
    assert found.nearest.value == 1.0
    assert found.svm.value < 0.8


def test_the_cost_is_chosen_among_samples_from_everywhere():
    train, _ = clouds(distance=20.0)
    order = train.labels.argsort(kind="stable")
    some = probes._spread(Samples(train.x[order], train.labels[order]), 40)
    assert np.bincount(some.labels).tolist() == [10] * 4


def test_a_low_cost_is_chosen_where_features_are_noise_and_a_high_one_where_scales_are_small():
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 2
    signal = np.where(labels, 1.0, -1.0)[:, None] + rng.standard_normal((300, 1))
    noise = 3 * rng.standard_normal((300, 200))
    noisy = Samples(np.hstack([signal, noise]).astype(np.float32), labels)
    small = Samples((0.01 * (signal - 1)).astype(np.float32), labels)
    assert choose_cost(noisy, seed=0) < choose_cost(small, seed=0)


def test_an_interval_holds_the_true_share_in_95_percent_of_cases():
    counts = np.random.default_rng(0).binomial(360, 0.97, size=2000)
    intervals = [Accuracy(count / 360, 360).interval() for count in counts.tolist()]
    held = sum(low <= 0.97 <= high for low, high in intervals) / 2000
    assert held == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("images", [1, 3, 360, 10_000])
def test_an_interval_holds_what_was_found_and_stays_within_0_and_1(share, images):
    low, high = Accuracy(share, images).interval()
    assert 0 <= low <= share <= high <= 1
    assert high - low > 0
