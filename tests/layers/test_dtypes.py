"""Layers that move numbers keep every dtype; layers that compute refuse whole numbers."""

import re

import pytest
import torch

from invertible import (
    CheckerboardSplit,
    FactorOut,
    Flatten,
    HaarWavelet,
    Identity,
    InjectivePad,
    Merge,
    PairRotation,
    PairScaling,
    Permute,
    PixelShuffle,
    PixelUnshuffle,
    Reshape,
    Split,
    StripeSplit,
    Swap,
)
from invertible.state import tensors

FLOATING = [torch.float16, torch.bfloat16, torch.complex64]
WHOLE = [torch.uint8, torch.int8, torch.int64, torch.bool]

MOVING = {
    "CheckerboardSplit": CheckerboardSplit(),
    "FactorOut": FactorOut(),
    "FactorOut behind others": FactorOut(),
    "Flatten": Flatten((4, 4, 4)),
    "Identity": Identity(),
    "InjectivePad": InjectivePad(2),
    "InjectivePad with a tolerance": InjectivePad(2, tolerance=0),
    "Merge": Merge(),
    "Permute": Permute([2, 0, 3, 1]),
    "PixelShuffle": PixelShuffle(2),
    "PixelUnshuffle": PixelUnshuffle(2),
    "Reshape": Reshape((4, 4, 4), (8, 8)),
    "Split": Split(),
    "StripeSplit": StripeSplit(),
    "Swap": Swap(),
}
COMPUTING = {
    "HaarWavelet": HaarWavelet(),
    "HaarWavelet, orthonormal": HaarWavelet(orthonormal=True),
    "HaarWavelet with a quantum": HaarWavelet(quantum=2**-8),
    "PairRotation": PairRotation(4),
    "PairRotation with a quantum": PairRotation(4, quantum=2**-8),
    "PairScaling": PairScaling(4),
    "PairScaling with a quantum": PairScaling(4, quantum=2**-8),
}


def numbers(dtype):
    return torch.arange(2 * 4 * 4 * 4).remainder(13).view(2, 4, 4, 4).to(dtype)


@pytest.mark.parametrize("dtype", WHOLE + FLOATING, ids=str)
@pytest.mark.parametrize("name", MOVING)
def test_a_layer_that_moves_numbers_keeps_them_and_their_dtype(name, dtype):
    layer, x = MOVING[name], numbers(dtype)
    if name in ("FactorOut behind others", "Merge", "Swap"):
        x = x.chunk(2, dim=1)
    y = layer(x)
    back = layer.inverse(y)
    assert {part.dtype for part in (*tensors(y), *tensors(back))} == {dtype}
    for found, expected in zip(tensors(back), tensors(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", COMPUTING)
def test_a_layer_that_computes_refuses_whole_numbers(name, inverse, dtype):
    layer = COMPUTING[name]
    whose = type(layer).__name__ + ("'s inverse" if inverse else "")
    message = (
        f"{whose} computes with its input and takes floating-point numbers, got {dtype}. Convert "
        "it: x.float(), or x.float() / 256 for 8-bit images, which puts them on the grid of every "
        "quantum up to 2**-8."
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        (layer.inverse if inverse else layer)(numbers(dtype))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("name", [name for name in COMPUTING if "quantum" not in name])
def test_a_layer_that_computes_keeps_every_floating_dtype(name, dtype):
    layer = COMPUTING[name]
    x = numbers(dtype)
    y = layer(x)
    back = layer.inverse(y)
    assert y.dtype == back.dtype == dtype
    torch.testing.assert_close(back, x, rtol=0.02, atol=0.1)


def test_images_of_bytes_come_back_as_the_message_promises():
    images = torch.randint(0, 256, (2, 4, 4, 4), dtype=torch.uint8)
    for name in COMPUTING:
        if "quantum" in name:
            x = images.float() / 256
            assert torch.equal(COMPUTING[name].inverse(COMPUTING[name](x)), x)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64], ids=str)
def test_no_whole_number_is_too_large_to_be_told_from_zero(dtype):
    y = torch.zeros(1, 2, dtype=dtype)
    y[0, 1] = torch.iinfo(dtype).min  # whose absolute value is itself
    with pytest.raises(ValueError, match="would crop values up to"):
        InjectivePad(1, tolerance=0.5).inverse(y)
