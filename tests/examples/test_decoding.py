import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from experiment.settings import recipe
from images.batches import plain
from images.readers import of_array
from invert import SHOWN, decode, draw, some_decoded

CPU = torch.device("cpu")


class Off(nn.Module):
    """Decodes the i-th image of a batch times the i-th factor; it is told by its first pixel."""

    def __init__(self, *factors):
        super().__init__()
        self.factors = nn.Parameter(torch.tensor(factors))

    def features(self, x):
        return x

    def inverse(self, phi):
        return phi * self.factors[: len(phi), None, None, None]

    def as_read(self, x):
        return x

    def classify(self, phi):
        return -(phi[:, 0, 0, :1] * 255 - torch.arange(10)).abs()


def undo(x):
    return 0.25 * x + 0.5


def of(*factors, images=None):
    x = torch.randn(len(factors), 1, 2, 2) if images is None else images
    return decode(Off(*factors), [(x, torch.zeros(len(x)))], undo)


def test_errors_are_relative_to_each_image():
    decoded = of(1.0, 1.5, 1.25)
    assert decoded["relative_error"] == pytest.approx(0.25)
    assert decoded["worst_error"] == pytest.approx(0.5)


def test_pixels_are_compared_with_white_being_1():
    x = torch.tensor([1.0, 2.0, -1.0, 0.0]).reshape(1, 1, 2, 2)
    assert of(2.0, images=x)["worst_pixel"] == pytest.approx(2 * 0.25)


def test_images_in_every_bit_are_counted():
    assert of(1.0, 1.0 + 2**-20, 1.0)["bit_for_bit"] == 2


def test_the_worst_image_is_found_whichever_batch_it_is_in():
    model = Off(1.0, 1.0, 1.0)
    factors = iter([(1.0, 1.1, 1.0), (1.0, 1.0, 3.0), (1.2, 1.0, 1.0)])

    def with_factors():
        for batch in torch.randn(9, 1, 2, 2).split(3):
            model.factors.data = torch.tensor(next(factors))
            yield batch, torch.zeros(3)

    decoded = decode(model, with_factors(), undo)
    assert decoded["images"] == 9
    assert decoded["worst_error"] == pytest.approx(2)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_wrong(factor):
    decoded = of(1.0, factor)
    measured = ("relative_error", "worst_error", "worst_pixel")
    assert [decoded[name] for name in measured] == [math.inf] * 3


def test_an_image_of_zeros_can_come_back_right():
    assert of(1.0, images=torch.zeros(1, 1, 2, 2))["relative_error"] == 0


def test_it_computes_in_the_dtype_of_the_weights():
    class Convolving(Off):
        def features(self, x):
            return nn.functional.conv2d(x, self.factors.view(1, 1, 1, 1))

    images = [(torch.randn(1, 1, 2, 2), torch.zeros(1))]
    assert decode(Convolving(1.0).double(), images, undo)["images"] == 1


def numbered():
    """Grey images all of whose pixels are their label, 0 to 9."""
    for labels in torch.arange(20).remainder(10).split(8):
        yield labels[:, None, None, None].expand(-1, 1, 2, 2) / 255, labels


def test_the_classes_found_are_compared_with_the_labels():
    class Below5(Off):
        def classify(self, phi):
            return super().classify(phi)[:, :5]

    found = decode(Below5(*[1.0] * 8), numbered(), undo)
    assert found["accuracy"] == 0.5
    assert found["bit_for_bit"] == 20


def test_the_picture_is_a_grid_with_a_title_above_each_row():
    rows = {"above": torch.rand(3, 3, 4, 4), "below": torch.rand(2, 1, 4, 4)}
    figure = draw([rows, {"alone": torch.rand(1, 1, 4, 4)}])
    first, second = figure.subfigs
    assert len(first.axes) == 6
    assert len(second.axes) == 3
    assert [first.axes[i].get_title("left") for i in (0, 3)] == ["above", "below"]
    assert [len(place.images) for place in first.axes] == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(("count", "shown"), [(30, SHOWN), (3, 3)])
def test_some_images_are_shown_evenly_spread_above_what_is_decoded(count, shown):
    pixels = np.arange(count, dtype=np.uint8)[:, None, None].repeat(16, 1).repeat(16, 2)
    images = of_array(pixels, np.zeros(count, np.int64), "0")
    config = replace(recipe("digits"), workers=0, mean=(0.0,), std=(1.0,))
    found = some_decoded(Off(*[0.5] * 12), plain(images, config, CPU), "above", "below")
    originals = found["above"]
    assert (255 * originals[:, 0, 0, 0]).tolist() == [count * i // shown for i in range(shown)]
    assert torch.equal(found["below"], originals / 2)
