"""Compositions nested at random have the gradients of ordinary training."""

import copy

import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import nn
from toys import Affine, AffineCoupling, Chained, TwiceEvaluated, images, linear

from invertible import (
    AdditiveCoupling,
    Composite,
    FactorOut,
    Identity,
    Inverse,
    InvertibleSequential,
    Merge,
    OnStreams,
    Parallel,
    Permute,
    Rebuild,
    ReversibleBlock,
    Split,
    Swap,
)

LINEAR = {
    "plain": lambda: linear(),
    "dropout": lambda: nn.Sequential(*linear(), nn.Dropout(0.4)),
    "statistics": lambda: nn.Sequential(nn.BatchNorm1d(2), *linear()),
}

# Layers of tensors of 4 channels, and of pairs of tensors of 2 each.
TENSORS = [lambda: Affine(0.2, 0.3), lambda: Permute.random(4, seed=0), Identity]
SETTINGS = [False, True, Rebuild(anchor_every=1), Rebuild(anchor_every=2)]


@st.composite
def pair_layers(draw, depth):
    f = LINEAR[draw(st.sampled_from(sorted(LINEAR)))]
    kinds = ["coupling", "block", "affine", "twice", "swap", "one stream"]
    match draw(st.sampled_from(kinds + ["sequence", "inverse", "streams", "whole"] * bool(depth))):
        case "coupling":
            return AdditiveCoupling(f())
        case "block":
            return ReversibleBlock(f(), f())
        case "affine":
            return AffineCoupling(linear(out=4))
        case "twice":
            return TwiceEvaluated(linear(out=4))
        case "swap":
            return Swap()
        case "one stream":
            return OnStreams(draw(st.integers(-2, 1)), Affine(-0.3, 0.1))
        case "inverse":
            return Inverse(draw(pair_layers(depth - 1)))
        case "streams":
            return OnStreams(draw(st.sampled_from([(0, 1), (1, 0)])), draw(pair_layers(depth - 1)))
        case "whole":
            inner = InvertibleSequential(draw(pair_layers(depth - 1)))
            inner.register_forward_hook(lambda *_: None)
            return inner
        case _:
            layers = draw(st.lists(pair_layers(depth - 1), min_size=1, max_size=3))
            return InvertibleSequential(*layers)


@st.composite
def tensor_layers(draw, depth):
    if not depth:
        return draw(st.sampled_from(TENSORS))()
    match draw(
        st.sampled_from(["layer", "pair", "parallel", "scales", "sequence", "inverse", "own"])
    ):
        case "layer":
            return draw(st.sampled_from(TENSORS))()
        case "pair":
            return InvertibleSequential(Split(), draw(pair_layers(depth - 1)), Merge())
        case "parallel":
            branch = InvertibleSequential(
                Parallel(Affine(0.1, 0.2), Identity()),
                draw(pair_layers(depth - 1)),
            )
            return InvertibleSequential(Split(), branch, Merge())
        case "scales":
            return InvertibleSequential(
                FactorOut(),
                draw(pair_layers(depth - 1)),
                FactorOut(),
                OnStreams((-1, 0), Parallel(Affine(0.1, 0.2), Affine())),
                Inverse(FactorOut()),
                draw(pair_layers(depth - 1)),
                Inverse(FactorOut()),
            )
        case "inverse":
            return Inverse(draw(tensor_layers(depth - 1)))
        case kind:
            layers = draw(st.lists(tensor_layers(depth - 1), min_size=1, max_size=3))
            return (Chained if kind == "own" else InvertibleSequential)(*layers)


@settings(max_examples=40)
@given(data=st.data(), method=st.sampled_from(["forward", "inverse"]), log_det=st.booleans())
def test_a_random_nest_has_the_gradients_of_ordinary_training(data, method, log_det):
    torch.manual_seed(0)
    layers = data.draw(st.lists(tensor_layers(3), min_size=1, max_size=3))
    stored = InvertibleSequential(*layers).double()
    rebuilt = copy.deepcopy(stored)
    for part in rebuilt.modules():
        if isinstance(part, Composite):
            part.checkpoint = data.draw(st.sampled_from(SETTINGS))
    note(str(rebuilt))
    results = []
    for network in (stored, rebuilt):
        torch.manual_seed(1)
        x = images(5, 4).requires_grad_()
        y = getattr(network, method + "_and_log_det" * log_det)(x)
        y, total = y if log_det else (y, x.new_zeros(5))
        loss = y.sin().sum() + (total * torch.arange(5)).sum()
        parameters = [x, *network.parameters()]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        results.append([y, total, gradients, list(network.buffers()), torch.rand(1)])
    (*found, buffers, drawn), (*expected, expected_buffers, expected_drawn) = results
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(buffers, expected_buffers, rtol=0, atol=0)
    assert torch.equal(drawn, expected_drawn)
