"""InjectivePad appends zeros at the right end of the right dimension."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import images

from invertible import InjectivePad


@given(dim=st.sampled_from([1, 2, 3, -1, -2, -3]), channels=st.integers(1, 4))
def test_zeros_are_appended_along_any_dimension(dim, channels):
    x = images(2, 3, 4, 5)
    zeros = torch.zeros_like(x.select(dim, 0)).unsqueeze(dim)
    y = InjectivePad(channels, dim)(x)
    assert torch.equal(y, torch.cat([x, *[zeros] * channels], dim))
    assert torch.equal(InjectivePad(channels, dim).inverse(y), x)


def test_vectors_are_padded():
    assert InjectivePad(2)(images(3, 4)).shape == (3, 6)


def test_it_is_not_bijective_and_defines_no_log_determinant():
    layer = InjectivePad(1)
    assert not layer.bijective
    with pytest.raises(NotImplementedError, match="InjectivePad defines no log-determinant"):
        layer.forward_and_log_det(images())


def test_anything_is_cropped_without_a_tolerance():
    assert torch.equal(InjectivePad(1).inverse(images()), images()[:, :3])


@given(size=st.floats(0, 2), sign=st.sampled_from([-1, 1]))
def test_no_more_than_the_tolerance_is_cropped(size, sign):
    y = images()
    y[:, 3:] = 0
    y[1, 3, 0, 1] = sign * size
    layer = InjectivePad(1, tolerance=1.0)
    if size <= 1:
        assert torch.equal(layer.inverse(y), y[:, :3])
    else:
        with pytest.raises(ValueError, match=rf"up to {size:.3g}, more than tolerance=1:"):
            layer.inverse(y)


def test_a_tolerance_of_zero_takes_what_forward_returned():
    layer = InjectivePad(1, tolerance=0)
    assert torch.equal(layer.inverse(layer(images())), images())


def test_an_empty_batch_is_padded_and_cropped():
    layer = InjectivePad(1, tolerance=0)
    assert layer.inverse(layer(images()[:0])).shape == (0, 4, 2, 2)


def test_the_options_are_shown():
    assert repr(InjectivePad(3, tolerance=0.1)) == "InjectivePad(channels=3, dim=1, tolerance=0.1)"
