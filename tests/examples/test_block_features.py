from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from analyses.block_features import (
    ProbeSettings,
    count_blocks,
    gather,
    read_features,
    spread_blocks,
)
from experiment.folder import RunError
from networks.irevnet import irevnet_digits
from networks.resnet import resnet_digits
from trainer.weights import load_network

CPU = torch.device("cpu")


@pytest.fixture(params=[irevnet_digits, resnet_digits])
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 1, 16, 16, generator=generator), torch.arange(size)) for size in sizes
    ]


@torch.no_grad()
def test_features_are_averages_of_each_block_in_the_order_of_the_images(model):
    given = batches(3, 2)
    count = count_blocks(model, given[0][0])
    found = gather(model, given, range(1, count + 1))
    states = [[phi.mean((2, 3)) for phi in model.each_block(x)] for x, _ in given]
    for x, *expected in zip(found.blocks, *states, strict=True):
        np.testing.assert_array_equal(x, torch.cat(expected))
    assert found.labels.tolist() == [0, 1, 2, 0, 1]


@torch.no_grad()
def test_the_last_block_has_the_average_of_the_features_that_the_network_classifies(model):
    ((x, _),) = batches(8)
    right = model(x).argmax(1)
    right[0] = (right[0] + 1) % 10
    found = gather(model, [(x, right)], [count_blocks(model, x)])
    np.testing.assert_allclose(found.blocks[0], model.features(x).mean((2, 3)), rtol=1e-5)
    assert found.accuracy.value == 7 / 8


def test_only_chosen_blocks_are_kept(model):
    found = gather(model, batches(2), [2, 5])
    expected = [phi.shape[1] for phi in model.each_block(batches(2)[0][0])]
    assert [x.shape[1] for x in found.blocks] == [expected[1], expected[4]]


def test_features_that_are_not_finite_are_refused():
    model, x = resnet_digits().eval(), torch.full((1, 1, 16, 16), torch.nan)
    with pytest.raises(RunError, match="behind block 2 are not finite: the network has diverged"):
        gather(model, [(x, torch.zeros(1, dtype=torch.long))], [2])


@pytest.mark.parametrize(
    ("count", "wanted", "chosen"),
    [(5, None, [1, 2, 3, 4, 5]), (9, 3, [3, 6, 9]), (10, 4, [2, 5, 7, 10]), (3, 7, [1, 2, 3])],
)
def test_blocks_are_evenly_spread_and_the_last_is_among_them(count, wanted, chosen):
    assert spread_blocks(count, wanted) == chosen


def test_limits_choose_images_and_samples_are_standardised(digits_run):
    network = load_network(Path(digits_run), CPU)
    settings = ProbeSettings(train_limit=60, test_limit=20)
    features = read_features(network, settings, CPU, Console(), depths=2)
    assert features.numbers == [1, 3]
    assert features.count == 3
    train, test = features.samples(1)
    assert len(train.x) == len(train.labels) == 60
    assert len(test.x) == len(test.labels) == 20
    np.testing.assert_allclose(train.x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train.x.std(0), 1, rtol=1e-4)
    assert abs(test.x.mean(0)).max() > 0.1  # shifted and scaled as the training images are


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"train_limit": 2}, "--train-limit must be at least 3, got 2"),
        ({"test_limit": 0}, "--test-limit must be at least 1, got 0"),
    ],
)
def test_too_few_images_are_refused(limits, message):
    with pytest.raises(RunError, match=message):
        ProbeSettings(**limits).check()
