"""The strategies draw all that a layer must cope with, and the same again from the same seed."""

import re
import subprocess
import sys

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

from invertible._support.memory_format import is_channels_last
from invertible.testing.strategies import image_shapes, pairs, tensors


def first(strategy, condition, examples=500):
    """The simplest example that meets a condition; fails if none is drawn."""
    return find(strategy, condition, settings=settings(max_examples=examples, database=None))


@given(st.data(), st.integers(0, 3), st.integers(1, 4), st.integers(1, 3))
def test_shapes_have_the_rank_and_are_multiples(data, rank, multiple, max_batch):
    batch, *sizes = data.draw(image_shapes(rank=rank, multiple=multiple, max_batch=max_batch))
    assert 1 <= batch <= max_batch
    assert len(sizes) == 1 + rank
    assert all(size % multiple == 0 and 1 <= size // multiple <= 3 for size in sizes)


@given(tensors())
def test_tensors_are_float64_images_by_default(x):
    assert x.dtype == torch.float64
    assert x.dim() == 4
    assert x.isfinite().all()


@given(tensors(st.just((2, 3))))
def test_a_shape_that_is_asked_for_is_drawn(x):
    assert x.shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", [tensors, pairs])
def test_every_dtype_that_is_asked_for_is_drawn(states, dtype):
    dtypes = [torch.float64, torch.float32, torch.bfloat16]
    x = first(states(dtypes=dtypes), lambda x: (x[0] if states is pairs else x).dtype == dtype)
    assert len({part.dtype for part in x}) == 1


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("expected", [True, False])
def test_both_memory_formats_are_drawn(rank, expected):
    shapes = image_shapes(rank=rank)
    first(tensors(shapes), lambda x: is_channels_last(x) == expected)
    x1, x2 = first(pairs(shapes), lambda x: is_channels_last(x[0]) == expected)
    assert is_channels_last(x1) == is_channels_last(x2)


@given(pairs())
def test_a_pair_has_two_of_one_shape_and_numbers_of_their_own(x):
    x1, x2 = x
    assert x1.shape == x2.shape
    assert not torch.equal(x1, x2)


@pytest.mark.parametrize("slices", [True, False])
def test_pairs_are_slices_of_one_tensor_or_tensors_of_their_own(slices):
    first(pairs(), lambda x: (storage(x[0]) == storage(x[1])) == slices)


def storage(x):
    return x.untyped_storage().data_ptr()


@pytest.mark.parametrize("strategy", [tensors(), pairs()])
def test_examples_come_from_hypothesis_alone(strategy):
    def draw(seed):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        x = first(strategy, lambda x: x[0].numel() > 8)
        assert torch.equal(torch.get_rng_state(), before)
        return x

    torch.testing.assert_close(draw(1), draw(2), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.03, 30])
def test_small_and_large_numbers_are_drawn(scale):
    first(tensors(), lambda x: (x.abs().max() < scale) == (scale < 1))


def test_streams_of_an_odd_number_of_channels_are_drawn():
    x1, x2 = first(pairs(st.just((2, 3, 4, 4))), lambda _: True)
    assert x1.shape == x2.shape == (2, 3, 4, 4)


MISTAKES = [
    (lambda: tensors((2, 4, 8, 8)), TypeError,
     "tensors takes a strategy of shapes, got a tuple of 4 (an int, an int, an int, an int). For "
     "this one alone write st.just((2, 4, 8, 8))."),
    (lambda: pairs([2, 4]), TypeError, "For this one alone write st.just((2, 4))."),
    (lambda: tensors(image_shapes), TypeError,
     "tensors takes a strategy of shapes, got a function. Call it."),
    (lambda: pairs(8), TypeError,
     "pairs takes a strategy of shapes, got an int. Draw them with image_shapes(), or "
     "st.just(shape) for one."),
    *((lambda dtypes=dtypes: tensors(dtypes=dtypes), TypeError,
       "tensors takes one or more dtypes as a list, for instance dtypes=[torch.float32], got "
       f"{dtypes!r}.") for dtypes in (torch.float32, [], ["float32"])),
    *((lambda option=option: image_shapes(**{option: -1}), ValueError,
       f"image_shapes takes {option} of at least {least}, got -1.")
      for option, least in {"rank": 0, "multiple": 1, "max_batch": 1}.items()),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES)
def test_a_mistake_is_told_before_anything_is_drawn(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("shape", [4, (2, -1), (2, 1.5), torch.zeros(2)])
def test_what_is_no_shape_is_told_when_it_is_drawn(shape):
    with pytest.raises(TypeError, match="takes a strategy of shapes, and it drew"):
        first(tensors(st.just(shape)), lambda _: True)


def test_a_pair_without_channels_is_told_when_it_is_drawn():
    message = "pairs takes shapes of at least 2 dimensions, (N, C, *), and the strategy drew (3,)."
    with pytest.raises(ValueError, match=re.escape(message)):
        first(pairs(st.just((3,))), lambda _: True)


@pytest.mark.slow
def test_what_torch_imports_for_its_first_gradient_is_no_part_of_a_tests_time():
    script = """
import sys
import torch
from invertible import PixelUnshuffle
from invertible.testing import inversecheck, strategies

before = set(sys.modules)
inversecheck(PixelUnshuffle(2), torch.zeros(1, 1, 2, 2, dtype=torch.float64))
assert len(set(sys.modules) - before) < 20, sorted(set(sys.modules) - before)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
