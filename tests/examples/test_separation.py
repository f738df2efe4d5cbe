import json

import numpy as np
import pytest
import torch
from pictures import noise
from starting import start

import dimensionality
import separation
from analysis import images
from dimensionality import dimensions
from errors import RunError
from experiment.settings import recipe
from presets import PRESETS
from separation import linear_svm, probe, read_features, share, spread_blocks
from trainer.weights import Network

FEW = ["--train-limit", "300", "--test-limit", "100", "--threads", "1"]


@pytest.fixture(params=["digits", "resnet-digits"])
def network(request):
    torch.manual_seed(0)
    model = PRESETS[request.param].build().eval()
    return Network(model, recipe(request.param), tuple("0123456789"), "untrained")


def read(network, limit=300, depths=None):
    return read_features(network, images(network, "test").at_most(limit), depths)


@torch.no_grad()
def test_features_are_averages_of_each_block_in_the_order_of_the_images(network):
    blocks, classes, _ = read(network)
    x, labels = zip(*images(network, "test").at_most(300).epoch(), strict=True)
    assert len(x) > 1
    assert classes.tolist() == torch.cat(labels).tolist()
    averages = [[phi.mean((2, 3)) for phi in network.model.each_block(each)] for each in x]
    assert [*blocks] == list(range(1, len(averages[0]) + 1))
    for block, expected in zip(blocks.values(), zip(*averages, strict=True), strict=True):
        np.testing.assert_array_equal(block, torch.cat(expected))


@torch.no_grad()
def test_the_last_block_has_the_average_of_the_features_that_the_network_classifies(network):
    blocks, _, guesses = read(network, depths=1)
    x = images(network, "test").at_most(300).joined()
    (last,) = blocks.values()
    np.testing.assert_allclose(last, network.model.features(x).mean((2, 3)), rtol=1e-3, atol=1e-5)
    assert guesses.tolist() == network.model(x).argmax(1).tolist()


def test_only_chosen_blocks_are_kept(network):
    blocks, _, _ = read(network, limit=2, depths=2)
    x = images(network, "test").at_most(2).joined()
    channels = [phi.shape[1] for phi in network.model.each_block(x)]
    count = len(channels)
    assert {block: x.shape[1] for block, x in blocks.items()} == {
        count // 2: channels[count // 2 - 1],
        count: channels[-1],
    }


def test_features_that_are_not_finite_are_refused(network):
    with torch.no_grad():
        next(network.model.parameters()).fill_(torch.nan)
    with pytest.raises(
        RunError, match=r"behind block \d+ are not finite: the network has diverged"
    ):
        read(network, limit=1, depths=2)


@pytest.mark.parametrize(
    ("count", "wanted", "chosen"),
    [(5, None, [1, 2, 3, 4, 5]), (9, 3, [3, 6, 9]), (10, 4, [2, 5, 7, 10]), (3, 7, [1, 2, 3])],
)
def test_blocks_are_evenly_spread_and_the_last_is_among_them(count, wanted, chosen):
    assert spread_blocks(count, wanted) == chosen


def test_features_are_standardised_by_those_of_the_training_images():
    rng = np.random.default_rng(0)
    x, test_x = (5 + 3 * rng.standard_normal((count, 7)) for count in (60, 20))
    [(facts, train, test)] = separation.points({3: x}, {3: test_x})
    assert (facts["block"], facts["channels"]) == (3, 7)
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(train.std(0), 1)
    np.testing.assert_allclose(test, (test_x - x.mean(0)) / x.std(0))


def clouds(distance, count=240, classes=4, features=12):
    """Training and test samples of classes whose means are so far apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    means = distance * np.eye(classes, features)
    x = (means[labels] + rng.standard_normal((count, features)) for _ in range(2))
    return [(each.astype(np.float32), labels) for each in x]


def test_both_read_separable_classes_without_error():
    found = probe(*clouds(distance=20.0), seed=0)
    assert found["svm"]["accuracy"] == found["nearest_neighbour"]["accuracy"] == 1


def test_both_are_at_chance_on_noise():
    found = probe(*clouds(distance=0.0), seed=0)
    for name in ("svm", "nearest_neighbour"):
        low, high = found[name]["interval"]
        assert low - 0.03 < 1 / 4 < high + 0.03


def test_only_the_nearest_neighbour_reads_classes_that_no_plane_parts():
    rng = np.random.default_rng(0)
    place = np.arange(90) % 3
    train, test = (
        ((10 * place + rng.random(90))[:, None].astype(np.float32), place % 2) for _ in range(2)
    )
    found = probe(train, test, seed=0)
    assert found["nearest_neighbour"]["accuracy"] == 1
    assert found["svm"]["accuracy"] < 0.8


def test_a_low_cost_is_chosen_where_features_are_noise_and_a_high_one_where_scales_are_small():
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 2
    signal = np.where(labels, 1.0, -1.0)[:, None] + rng.standard_normal((300, 1))
    noise = 3 * rng.standard_normal((300, 200))
    noisy = (np.hstack([signal, noise]).astype(np.float32), labels)
    small = ((0.01 * (signal - 1)).astype(np.float32), labels)
    assert linear_svm(noisy, seed=0).C < linear_svm(small, seed=0).C


def found(right, images):
    return share(np.arange(images) < right, np.full(images, True))


def test_an_interval_holds_the_true_share_in_95_percent_of_cases():
    counts = np.random.default_rng(0).binomial(360, 0.97, size=2000)
    intervals = {count: found(count, 360)["interval"] for count in set(counts.tolist())}
    held = np.mean([low <= 0.97 <= high for low, high in map(intervals.get, counts.tolist())])
    assert held == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("images", [1, 3, 360, 10_000])
def test_an_interval_holds_what_was_found_and_stays_within_0_and_1(part, images):
    measured = found(round(part * images), images)
    low, high = measured["interval"]
    assert 0 <= low <= measured["accuracy"] <= high <= 1
    assert high - low > 0


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [1]), (5, [1, 2, 5]), (12, [1, 2, 5, 10, 12]), (200, [1, 2, 5, 10, 20, 50, 100, 200])],
)
def test_dimensions_rise_to_all(count, expected):
    assert dimensions(count) == expected


@pytest.mark.slow
def test_it_probes_the_components_of_the_last_features(digits_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(separation, "COSTS", (0.01,))
    flags = ["--weights", digits_run, *FEW, "--out", tmp_path]
    assert start(dimensionality.main, *flags) == 0
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


def test_it_probes_each_network_and_draws_them_in_one_figure(digits_run, tmp_path, monkeypatch):
    monkeypatch.setattr(separation, "COSTS", (0.01,))
    flags = ["--weights", digits_run, digits_run, *FEW, "--depths", 2, "--out", tmp_path]
    assert start(separation.main, *flags) == 0
    first, second = json.loads((tmp_path / "separation.json").read_text())["networks"]
    assert first == second
    assert [point["block"] for point in first["points"]] == [1, 3]
    assert [point["channels"] for point in first["points"]] == [16, 256]
    assert (first["train_images"], first["test_images"], first["blocks"]) == (300, 100, 3)
    assert first["points"][-1]["svm"]["accuracy"] > 0.5 > 0.2 > first["chance"]
    for ending in ("png", "pdf"):
        assert (tmp_path / f"separation.{ending}").stat().st_size > 1000


def test_images_of_other_classes_are_refused(digits_run, tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / part / "only").mkdir(parents=True)
        noise(16, 16).save(tmp_path / part / "only/image.png")
    flags = ["--weights", digits_run, "--data", tmp_path, "--out", tmp_path / "figures"]
    assert start(separation.main, *flags) == 1
    assert "other classes than the network: 10 classes were trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depths", "0"], "error: --depths must be at least 1, got 0."),
        (["--test-limit", "0"], "error: --test-limit must be at least 1, got 0."),
        (["--train-limit", "1"], "error: --train-limit must be at least 3, got 1."),
        (["--weights", "nowhere"], "error: there is no nowhere"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(flags, message, tmp_path, capsys):
    assert start(separation.main, *flags, "--out", tmp_path) == 1
    assert message in capsys.readouterr().err
