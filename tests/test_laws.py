"""Every law of the contract, for every layer and for compositions drawn at random."""

import pytest
import torch
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st
from registry import CONDITIONAL_LAYERS, EXACT_LAYERS, EXPORTED, LAYERS, NOISY_LAYERS, QUANTUM
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import bottleneck

from invertible import (
    AdditiveCoupling,
    Composite,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    Parallel,
    Permute,
    PixelShuffle,
    PixelUnshuffle,
    Quantize,
    Split,
    Swap,
)
from invertible.state import map_streams, streams_of
from invertible.state import tensors as tensors_of
from invertible.testing import inversecheck
from invertible.testing.strategies import image_shapes, pairs, tensors

WEIGHTS = st.random_module()  # seeds the generators that draw them


def test_every_layer_is_registered():
    tested = {name.split()[0] for name in LAYERS | EXACT_LAYERS | CONDITIONAL_LAYERS}
    assert tested | NOISY_LAYERS >= EXPORTED


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=15)
@given(data=st.data(), training=st.booleans())
def test_a_layer_keeps_the_laws(name, data, training):
    make, states = LAYERS[name]
    x = data.draw(states())
    data.draw(WEIGHTS)
    inversecheck(make(x).double().train(training), x)


@pytest.mark.parametrize("name", CONDITIONAL_LAYERS)
@settings(max_examples=15)
@given(data=st.data(), training=st.booleans())
def test_a_conditional_layer_keeps_the_laws(name, data, training):
    make, states, context = CONDITIONAL_LAYERS[name]
    x = data.draw(states())
    data.draw(WEIGHTS)
    inversecheck(make(x).double().train(training), x, context(x))


# Only rounding differs from float64.
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=5)
@given(data=st.data(), training=st.booleans())
def test_a_layer_keeps_the_laws_in_float32(name, data, training):
    make, states = LAYERS[name]
    x = data.draw(states(dtypes=[torch.float32]))
    data.draw(WEIGHTS)
    # BatchNorm divides rounding errors by a deviation that can be small.
    inversecheck(make(x).train(training), x, tolerance=1e-4)


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=10)
@given(data=st.data())
def test_a_layer_keeps_bfloat16(name, data):
    make, states = LAYERS[name]
    x = data.draw(states(dtypes=[torch.bfloat16]))
    data.draw(WEIGHTS)
    layer = make(x).bfloat16().eval()
    # A spline behind four others that read it amplifies rounding dozens of times.
    inversecheck(layer, x, tolerance=0.3, laws=["dtype and device", "inverse undoes forward"])


@pytest.mark.parametrize("where", [torch.device("meta"), FakeTensorMode()], ids=["meta", "fake"])
@pytest.mark.parametrize("name", LAYERS | EXACT_LAYERS)
@settings(max_examples=2, phases=[Phase.generate])
@given(data=st.data())
def test_a_layer_takes_tensors_without_values(name, where, data):
    """As those who infer shapes or estimate memory do."""
    make, states = (LAYERS | EXACT_LAYERS)[name]
    real = Quantize(QUANTUM)(data.draw(states(dtypes=[torch.float32])))
    with torch.random.fork_rng():
        expected = make(real)(real)
    with where:
        x = map_streams(lambda s: torch.empty_strided(s.shape, s.stride()).requires_grad_(), real)
        layer = make(x)
        y = layer(x)
        assert [s.shape for s in streams_of(y)] == [s.shape for s in streams_of(expected)]
        layer.inverse(y)
        if has_log_det(layer):
            layer.forward_and_log_det(x)
        network = InvertibleSequential(layer, checkpoint=True)
        sum(stream.sum() for stream in streams_of(network(x))).backward()
        assert all(stream.grad.shape == stream.shape for stream in streams_of(x))


def has_log_det(layer):
    """Whether it defines one: nothing is computed here."""
    own = type(layer).forward_and_log_det is not InvertibleModule.forward_and_log_det
    return layer.volume_preserving or (own and not isinstance(layer, Composite))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "way", ["forward", "inverse", "forward_and_log_det", "inverse_and_log_det"]
)
@settings(max_examples=3)
@given(data=st.data(), size=st.sampled_from([1e3, 1e6]))
def test_values_log_determinants_and_gradients_are_finite_for_large_inputs(name, way, data, size):
    make, states = LAYERS[name]
    x = data.draw(states(dtypes=[torch.float32]))
    layer = make(x).eval()
    with torch.no_grad():
        given = layer(x) if "inverse" in way else x
    leaves = [(size * part / part.abs().max()).requires_grad_() for part in tensors_of(given)]
    run = getattr(layer, way)
    try:
        results = run(tuple(leaves) if isinstance(given, tuple) else leaves[0])
    except NotImplementedError:
        return
    outputs = [part for part in tensors_of(results) if part.requires_grad]
    gradients = torch.autograd.grad(
        sum(part.sum() for part in outputs),
        [*leaves, *layer.parameters()],
        materialize_grads=True,
    )
    for part in (*outputs, *gradients):
        assert part.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=1)
@given(data=st.data())
def test_an_empty_batch_goes_through(name, data):
    make, states = LAYERS[name]
    x = data.draw(states())
    layer = make(x).double().eval()
    empty = tuple(part[:0] for part in x) if isinstance(x, tuple) else x[:0]
    y = layer(empty)
    torch.testing.assert_close(layer.inverse(y), empty)
    if layer.bijective:
        for run, state in ((layer.forward_and_log_det, empty), (layer.inverse_and_log_det, y)):
            assert run(state)[1].shape == (0,)


@st.composite
def stacks(draw, x):
    """A composition that takes ``x``, made by adding layers that fit behind the last."""
    layers = []
    for _ in range(draw(st.integers(1, 6))):
        options = _pair_layers(x) if isinstance(x, tuple) else _tensor_layers(x)
        layer = draw(st.sampled_from(options))().double()
        with torch.no_grad():
            x = layer.eval()(x)
        layers.append(layer)
    return InvertibleSequential(*layers)


def _tensor_layers(x):
    options = [lambda: Permute.random(x.shape[1], seed=1)]
    # One channel or one pixel on the way would lose the memory format.
    if x.shape[1] % 2 == 0 and x.shape[1] > 2:
        options.append(Split)
    if x.shape[1] % 4 == 0 and x.shape[1] > 4:
        options.append(lambda: PixelShuffle(2))
    if x.shape[2] % 4 == 0 and x.shape[3] % 4 == 0:
        options.append(lambda: PixelUnshuffle(2, order="offset-major"))
    return options


def _pair_layers(x):
    return [
        Merge,
        Swap,
        lambda: AdditiveCoupling(bottleneck(x[1].shape[1])),
        lambda: Parallel(Permute.random(x[0].shape[1], seed=2), PixelUnshuffle(1)),
    ]


@given(data=st.data(), training=st.booleans(), pair=st.booleans())
def test_a_random_stack_keeps_the_laws(data, training, pair):
    x = data.draw(pairs() if pair else tensors(image_shapes(max_batch=2)))
    stack = data.draw(stacks(x)).train(training)
    note(repr(stack))
    inversecheck(stack, x)
