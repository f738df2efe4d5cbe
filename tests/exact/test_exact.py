"""Exact mode: states are rebuilt to the last bit, and gradients with them."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from registry import EXACT_LAYERS, LAYERS, QUANTUM
from torch import nn
from toys import body_images as images
from toys import bottleneck

from invertible import (
    AdditiveCoupling,
    FactorOut,
    HaarWavelet,
    Inverse,
    InvertibleSequential,
    Merge,
    OnStreams,
    PairRotation,
    PairScaling,
    Parallel,
    Permute,
    PixelUnshuffle,
    Quantize,
    Rebuild,
    Split,
    Swap,
    reversible_checkpoint,
)
from invertible.exact import ranges
from invertible.testing import inversecheck
from invertible.testing.strategies import image_shapes, tensors

DTYPES = [torch.float32, torch.float64]


def rounded(state, quantum=QUANTUM):
    if isinstance(state, tuple):
        return tuple(rounded(x, quantum) for x in state)
    return (state / quantum).round() * quantum


def on_grid(state, quantum=QUANTUM):
    """The state, rounded to the grid and small enough for float32."""
    if isinstance(state, tuple):
        return tuple(on_grid(x, quantum) for x in state)
    return rounded(state.clamp(-(2**16) * quantum, 2**16 * quantum), quantum)


def equal(one, other):
    if isinstance(one, tuple):
        return all(map(equal, one, other))
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


# --- single layers


@pytest.mark.parametrize("name", EXACT_LAYERS)
@given(data=st.data(), training=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_a_layer_on_the_grid_is_inverted_bit_for_bit(name, data, training, dtype):
    make, states = EXACT_LAYERS[name]
    x = on_grid(data.draw(states(dtypes=[dtype])))
    layer = make(x).to(dtype).train(training)
    assert layer.exact
    seed = torch.get_rng_state()
    with torch.no_grad():
        y = layer(x)
        torch.set_rng_state(seed)
        assert equal(layer.inverse(y), x)
        assert equal(rounded(y), y)
        torch.set_rng_state(seed)
        x = layer.inverse(y)
        torch.set_rng_state(seed)
        assert equal(layer(x), y)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT_LAYERS)
@given(data=st.data(), training=st.booleans())
def test_a_layer_with_a_quantum_keeps_the_laws(name, data, training):
    make, states = EXACT_LAYERS[name]
    x = on_grid(data.draw(states()))
    inversecheck(make(x).double().train(training), x)


@pytest.mark.parametrize("name", LAYERS)
@given(data=st.data())
def test_layers_that_only_move_numbers_are_exact(name, data):
    make, states = LAYERS[name]
    x = data.draw(states(dtypes=[torch.float32]))
    layer = make(x).eval()
    if layer.moves_only:
        assert equal(layer.inverse(layer(x)), x)
    else:
        assert not layer.exact


@pytest.mark.parametrize(
    "make",
    [
        lambda q: HaarWavelet(quantum=q),
        lambda q: PairRotation(4, quantum=q),
        lambda q: PairScaling(4, quantum=q),
        lambda q: AdditiveCoupling(nn.Conv2d(4, 4, 1), quantum=q),
    ],
    ids=["HaarWavelet", "PairRotation", "PairScaling", "AdditiveCoupling"],
)
def test_a_fine_quantum_comes_close_to_the_float_version(make):
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    x = on_grid(x, 2**-30)
    state = (x, x) if isinstance(make(None), AdditiveCoupling) else x
    layers = []
    for quantum in (None, 2**-30):
        torch.manual_seed(0)
        layer = make(quantum).double()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        layers.append(layer)
    plain, exact = (layer(state) for layer in layers)
    torch.testing.assert_close(exact, plain, rtol=0, atol=20 * 2**-30)


@given(angle=st.floats(-20, 20))
def test_rotation_is_right_at_every_angle(angle):
    layer = PairRotation(2, quantum=2**-40).double()
    nn.init.constant_(layer.angle, angle)
    cos, sin = math.cos(angle), math.sin(angle)
    expected = torch.tensor([[cos - 2 * sin, sin + 2 * cos]], dtype=torch.float64)
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-11)


def test_learned_shears_get_the_gradient_of_the_float_version():
    x = on_grid(torch.randn(2, 4, 4, 4, dtype=torch.float64), 2**-40)
    for make, name in ((PairScaling, "log_scale"), (PairRotation, "angle")):
        gradients = []
        for quantum in (None, 2**-40):
            layer = make(4, quantum=quantum).double()
            nn.init.constant_(getattr(layer, name), 0.3)
            layer(x).sin().sum().backward()
            gradients.append(getattr(layer, name).grad)
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_eight_bit_images_pass_quantize_unchanged():
    x = torch.arange(256).float().view(1, 1, 16, 16) / 256
    assert torch.equal(Quantize(2**-8)(x), x)
    assert torch.equal(Quantize(2**-16)(x), x)


# --- compositions


def network(depth, quantum=QUANTUM, dropout=0.2, **options):
    """Everything that can be exact, on images with 2 channels."""
    blocks = [
        layer
        for _ in range(depth)
        for layer in (AdditiveCoupling(bottleneck(4, dropout, nn.ReLU), quantum=quantum), Swap())
    ]
    rotation, scaling = PairRotation(8, quantum=quantum), PairScaling(8, quantum=quantum)
    nn.init.normal_(rotation.angle)
    nn.init.normal_(scaling.log_scale, std=0.3)
    downsampling = [HaarWavelet(quantum=quantum), rotation, scaling, Permute.random(8, seed=1)]
    return InvertibleSequential(
        Quantize(quantum or 2**-16), *downsampling, Split(), *blocks, Merge(), **options
    )


def everything(model, x, autocast):
    """Output, gradients and buffers of a training step."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.sin().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters()), *model.buffers(), torch.rand(2)]


@settings(max_examples=20)
@given(
    depth=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    training=st.booleans(),
    autocast=st.booleans(),
    channels_last=st.booleans(),
    anchor_every=st.sampled_from([None, 4]),
)
def test_gradients_are_those_of_ordinary_training_bit_for_bit(
    depth, seed, dtype, training, autocast, channels_last, anchor_every
):
    torch.manual_seed(seed)
    autocast = autocast and dtype == torch.float32
    stored = network(depth).to(dtype).train(training)
    rebuilt = copy.deepcopy(stored)
    rebuilt.checkpoint = Rebuild(anchor_every=anchor_every)
    x = images(seed=seed).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    found, expected = everything(rebuilt, x, autocast), everything(stored, x, autocast)
    assert all(map(torch.equal, found, expected))


@settings(max_examples=20)
@given(
    x=tensors(image_shapes(multiple=4), dtypes=DTYPES),
    depth=st.integers(1, 6),
    training=st.booleans(),
    autocast=st.booleans(),
)
def test_a_network_is_inverted_bit_for_bit(x, depth, training, autocast):
    x = on_grid(x)
    autocast = autocast and x.dtype == torch.float32
    c = x.shape[1] // 2
    blocks = [
        layer
        for _ in range(depth)
        for layer in (AdditiveCoupling(bottleneck(2 * c * 2), quantum=QUANTUM), Swap())
    ]
    model = InvertibleSequential(HaarWavelet(quantum=QUANTUM), Split(), *blocks, Merge())
    model.to(x.dtype).train(training)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(model.inverse(model(x)), x)


def scales(quantum, **options):
    """Two scales, and between them half is factored out and shifted by the other half."""

    def blocks(channels):
        half = channels // 2
        shift = AdditiveCoupling(bottleneck(half, 0.2, nn.ReLU), quantum=quantum)
        return [PixelUnshuffle(2), Split(), shift, Swap(), Merge()]

    prior = AdditiveCoupling(bottleneck(4, 0.2), quantum=quantum)
    deeper = InvertibleSequential(*blocks(16))
    layers = [*blocks(8), FactorOut(), OnStreams((-1, 0), prior), OnStreams(0, deeper)]
    return InvertibleSequential(Quantize(quantum), *layers, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_network_of_several_scales_is_exact(dtype):
    torch.manual_seed(0)
    stored = scales(2**-16).to(dtype)
    rebuilt = copy.deepcopy(stored)
    rebuilt.checkpoint = True
    assert rebuilt.quantum == 2**-16
    x = images().to(dtype)

    def joined(network):
        def run(x):
            return torch.cat([part.flatten() for part in network(x)])

        run.parameters, run.buffers = network.parameters, network.buffers
        return run

    found, expected = (everything(joined(net), x, False) for net in (rebuilt, stored))
    assert all(map(torch.equal, found, expected))
    rebuilt.eval()
    assert torch.equal(rebuilt.inverse(rebuilt(x)), Quantize(2**-16)(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_thousand_blocks_in_train_mode_are_rebuilt_bit_for_bit(autocast):
    torch.manual_seed(0)
    stored = network(1000, 2**-16, dropout=0.1)
    rebuilt = copy.deepcopy(stored)
    rebuilt.checkpoint = True
    x = images(2).float()
    assert all(map(torch.equal, everything(rebuilt, x, autocast), everything(stored, x, autocast)))


def test_a_composition_says_whether_it_is_exact():
    exact = network(2)
    assert exact.exact
    assert exact.quantum == QUANTUM
    assert exact.inexact_layers == {}
    assert Inverse(exact[5:]).exact
    mixed = InvertibleSequential(
        Split(), InvertibleSequential(Swap(), AdditiveCoupling(nn.Conv2d(4, 4, 1))), Merge()
    )
    assert not mixed.exact
    assert list(mixed.inexact_layers) == ["1.1"]
    assert InvertibleSequential(Split(), Merge()).moves_only
    assert InvertibleSequential(Split(), Merge()).exact
    assert InvertibleSequential(Split(), Merge()).quantum is None
    assert Parallel(PixelUnshuffle(2), HaarWavelet(quantum=2**-5)).quantum == 2**-5
    assert not Parallel(PixelUnshuffle(2), HaarWavelet()).exact


# --- leaving the grid


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full_like(x, self.value)


def growing(value, **options):
    layers = [AdditiveCoupling(Constant(value), quantum=2**-16) for _ in range(3)]
    return InvertibleSequential(Split(), *layers, Merge(), **options)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_leaving_the_range_is_an_error_that_names_the_quantum_to_take(checkpoint):
    x = torch.zeros(2, 4, requires_grad=True)
    model = growing(100.0, checkpoint=checkpoint)
    with pytest.raises(
        ValueError,
        match=r"output of InvertibleSequential .* reached 300, and with quantum 2\*\*-16 sums are "
        r"exact only below 256 .* quantum=2\*\*-14",
    ):
        model(x)
    assert model.double()(x.double()).isfinite().all()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_layer_that_leaves_the_range_is_named_on_request(checkpoint):
    model = growing(150.0, checkpoint=checkpoint, check_layers=True)
    with pytest.raises(ValueError, match=r"the output of layer 2 \(AdditiveCoupling\) reached 300"):
        model(torch.zeros(2, 4, requires_grad=True))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_training_on_an_accelerator_turns_what_leaves_the_range_into_nan(monkeypatch, checkpoint):
    monkeypatch.setattr(ranges, "accelerators", lambda _: [torch.device("cuda")])
    x = torch.zeros(2, 4, requires_grad=True)
    assert growing(100.0, checkpoint=checkpoint)(x).isnan().all()
    assert Quantize(2**-8)(torch.full((1, 2), 1e9)).isnan().all()
    assert growing(1.0, checkpoint=checkpoint)(x + 0.1).isnan().all()
    assert growing(1.0, checkpoint=checkpoint).inverse(x + 1e9).isnan().all()
    inside = growing(1.0, checkpoint=checkpoint)(x)
    assert torch.equal(inside, torch.tensor([[3.0, 3.0, 0, 0]] * 2))
    inside.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 4))
    with pytest.raises(ValueError, match="the output of layer 2"):
        growing(150.0, checkpoint=checkpoint, check_layers=True)(x)
    with torch.no_grad(), pytest.raises(ValueError, match="reached 300"):
        growing(100.0)(x)


def test_leaving_the_range_backward_is_an_error():
    with pytest.raises(ValueError, match=r"inverse of InvertibleSequential .* reached 300"):
        growing(-100.0).inverse(torch.zeros(2, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_an_error(value):
    with pytest.raises(ValueError, match="has diverged, or its input is not finite"):
        growing(value)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"the input of Quantize reached (nan|inf)"):
        Quantize(2**-8)(torch.tensor([[value]]))


def test_an_input_beside_the_grid_is_an_error_that_says_quantize():
    with pytest.raises(ValueError, match=r"not on the grid .* Put Quantize\(2\*\*-16\) first"):
        growing(1.0)(torch.full((2, 4), 0.1))
    with pytest.raises(ValueError, match="not on the grid"):
        reversible_checkpoint(growing(1.0), torch.full((2, 4), 0.1))
    # Edited features may be decoded.
    assert growing(1.0).inverse(torch.full((2, 4), 0.1)).shape == (2, 4)


def test_quantize_inside_an_inner_layer_takes_any_input():
    inner = InvertibleSequential(PixelUnshuffle(2), Quantize(2**-8))
    inner.register_forward_hook(lambda *_: None)  # called as a whole then
    x = torch.randn(2, 2, 4, 4)
    for checkpoint in (False, True):
        assert InvertibleSequential(inner, Split(), checkpoint=checkpoint)(x)
        both = Parallel(Quantize(2**-8), Quantize(2**-10))
        assert InvertibleSequential(Split(), both, checkpoint=checkpoint)(x)
    with pytest.raises(ValueError, match="not on the grid"):
        InvertibleSequential(Split(), Parallel(Quantize(2**-8), HaarWavelet(quantum=2**-8)))(x)


@pytest.mark.parametrize("quantum", [0.0, -0.5, 0.1, 3.0, math.inf, math.nan])
def test_a_quantum_that_is_no_power_of_two_is_refused(quantum):
    makers = [
        lambda: Quantize(quantum),
        lambda: HaarWavelet(quantum=quantum),
        lambda: PairScaling(2, quantum=quantum),
        lambda: AdditiveCoupling(nn.Identity(), quantum=quantum),
    ]
    for make in makers:
        with pytest.raises(ValueError, match="takes a power of two as quantum"):
            make()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_state_of_low_precision_is_refused(dtype):
    x = torch.zeros(1, 2, 2, 2, dtype=dtype)
    for layer, state in (
        (Quantize(2**-4), x),
        (HaarWavelet(quantum=2**-4), x),
        (PairRotation(2, quantum=2**-4), x),
        (AdditiveCoupling(nn.Identity(), quantum=2**-4), (x, x)),
    ):
        with pytest.raises(TypeError, match="takes a float32 or float64 state"):
            layer(state)


@pytest.mark.parametrize("make", [PairRotation, PairScaling])
def test_channel_pairs_refuse_what_does_not_fit(make):
    with pytest.raises(ValueError, match="even number of channels of at least 2, got 3"):
        make(3)
    with pytest.raises(ValueError, match="takes 4 channels, got 6"):
        make(4)(torch.zeros(1, 6))
    with pytest.raises(TypeError, match="takes a tensor, got a tuple"):
        make(4)((torch.zeros(1, 2), torch.zeros(1, 2)))


def test_a_wavelet_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="multiples of its factor 2"):
        HaarWavelet()(torch.zeros(1, 1, 3, 4))
    with pytest.raises(ValueError, match="multiple of 4 channels"):
        HaarWavelet().inverse(torch.zeros(1, 6, 2, 2))
    with pytest.raises(ValueError, match="order"):
        HaarWavelet(order="torch")
