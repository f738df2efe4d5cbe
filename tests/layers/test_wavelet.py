"""HaarWavelet computes the averages and differences of its formula, in 1, 2 and 3 dimensions."""

import itertools

import pytest
import torch
from toys import images

from invertible import HaarWavelet


def by_loops(x, order):
    """The definition: along some dimensions the difference of neighbours, else their average."""
    n, c, *sides = x.shape
    bands = list(itertools.product((0, 1), repeat=len(sides)))
    y = x.new_empty(n, c * len(bands), *(side // 2 for side in sides))
    for (i, band), channel in itertools.product(enumerate(bands), range(c)):
        found = x[:, channel]
        for dim, difference in enumerate(band, start=1):
            a, b = found.unflatten(dim, (-1, 2)).unbind(dim + 1)
            found = b - a if difference else (a + b) / 2
        y[:, channel * len(bands) + i if order == "channel-major" else i * c + channel] = found
    return y


@pytest.mark.parametrize("order", ["channel-major", "offset-major"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_bands_are_averages_and_differences_along_each_dimension(order, rank):
    x = images(2, 3, *[4, 2, 6][:rank])
    layer = HaarWavelet(order=order)
    torch.testing.assert_close(layer(x), by_loops(x, order))
    torch.testing.assert_close(layer.inverse(by_loops(x, order)), x)


def test_the_quantum_is_shown():
    assert "quantum=0.5" in repr(HaarWavelet(quantum=2**-1))
