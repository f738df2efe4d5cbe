"""Wavelet Flow: each level is a density of details given the picture in half its size."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import assert_same_gradients, both, images

from invertible import (
    AffineCoupling,
    FactorOut,
    HaarWavelet,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    OnStreams,
    Permute,
    Split,
    Swap,
)
from invertible.testing import inversecheck


def convolutions(channels: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, out, 1))


def level(channels: int) -> InvertibleSequential:
    """A picture becomes one of half its size, and details that are whitened, given that."""
    details = 3 * channels
    changed = details // 2
    kept = 4 * channels - changed
    turned = [*range(channels), *range(kept, 4 * channels), *range(channels, kept)]

    def step() -> list[InvertibleModule]:
        f = convolutions(kept, 2 * changed)
        coupling = [Split((kept, changed)), Swap(), AffineCoupling(f), Swap()]
        return [*coupling, Merge((kept, changed)), Permute(turned)]

    return InvertibleSequential(
        HaarWavelet(orthonormal=True, order="offset-major"),
        *(step() + step() + step()),
        FactorOut((channels, details)),
    )


def pyramid(channels: int, levels: int) -> InvertibleSequential:
    """Levels in each other: (smallest picture, details of the first level, of the second, ...)."""
    network = level(channels)
    for _ in range(levels - 1):
        network.extend([OnStreams(0, level(channels)[:-1]), FactorOut((channels, 3 * channels))])
    return network


def log_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def shrunk(x: Tensor) -> Tensor:
    """Half the size; the wavelet's factor keeps lengths."""
    return 2 * F.avg_pool2d(x, 2)


@pytest.mark.slow
def test_a_level_keeps_the_laws():
    torch.manual_seed(0)
    inversecheck(level(2).double(), images(2, 2, 4, 4))
    inversecheck(pyramid(1, 3).double(), images(2, 1, 8, 8))


def test_the_smaller_picture_goes_on_as_it_is():
    torch.manual_seed(0)
    x = images(2, 2, 8, 8)
    low, z = level(2).double()(x)
    torch.testing.assert_close(low, shrunk(x))
    assert z.shape == (2, 6, 4, 4)
    low, *details = pyramid(2, 3).double()(x)
    torch.testing.assert_close(low, shrunk(shrunk(shrunk(x))))
    assert [part.shape[2] for part in details] == [4, 2, 1]


def test_a_level_is_the_density_of_details_given_the_smaller_picture():
    """Its log-determinant is that of the map from details alone, at a fixed smaller picture."""
    torch.manual_seed(0)
    network = level(1).double()
    x = images(1, 1, 4, 4)
    wavelet = network[0]
    low, details = wavelet(x).tensor_split([1], dim=1)

    def latent(given: Tensor) -> Tensor:
        return network(wavelet.inverse(torch.cat((low, given), 1)))[1].flatten()

    jacobian = torch.autograd.functional.jacobian(latent, details).flatten(1)
    _, log_det = network.forward_and_log_det(x)
    torch.testing.assert_close(log_det[0], jacobian.slogdet()[1])


def test_levels_can_be_trained_apart_since_their_densities_multiply():
    torch.manual_seed(0)
    network = pyramid(2, 3).double()
    x = images(3, 2, 8, 8)
    (low, *details), log_det = network.forward_and_log_det(x)
    whole = log_normal(low) + sum(map(log_normal, details)) + log_det
    levels = [network[: len(level(2))], *(network[i].layer for i in (-4, -2))]
    assert sum(len([*part.parameters()]) for part in levels) == len([*network.parameters()])
    total = log_normal(low)
    picture = x
    for one in levels:
        found, of_level = one.forward_and_log_det(picture)
        z = found[1] if isinstance(found, tuple) else found[:, 2:]
        total = total + log_normal(z) + of_level
        picture = shrunk(picture)
    torch.testing.assert_close(total, whole)


def test_details_are_drawn_for_a_smaller_picture():
    torch.manual_seed(0)
    network, low = level(1).double(), images(2, 1, 4, 4)
    one, other = (network.inverse((low, torch.randn(2, 3, 4, 4).double())) for _ in range(2))
    torch.testing.assert_close(shrunk(one), low)
    torch.testing.assert_close(shrunk(other), low)
    assert not torch.allclose(one, other)


def test_gradients_are_those_of_stored_activations():
    def loss(network: InvertibleSequential) -> Tensor:
        parts, log_det = network.forward_and_log_det(images(2, 1, 8, 8))
        return sum(part.sin().sum() for part in parts) + log_det.square().sum()

    assert_same_gradients(both(lambda: pyramid(1, 3).double()), loss)
