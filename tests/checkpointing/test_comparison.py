"""What was rebuilt is compared by value: what is wrong raises, and what is right never does."""

import math
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from toys import (
    AffineCoupling,
    TwiceEvaluated,
    body,
    body_images,
    bottleneck,
    images,
    pair,
)

from invertible import (
    AdditiveCoupling,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    PixelUnshuffle,
    Quantize,
    Rebuild,
    RebuildError,
    ReversibleBlock,
    Split,
    Swap,
)
from invertible.checkpointing.samples import COUNT, sample

NOT_AS_IT_RAN = "was not rebuilt as it ran"


class NumpyDropout(nn.Module):
    """Draws from a generator that torch knows nothing of."""

    def forward(self, x):
        mask = np.random.default_rng().random(x.shape) < 0.5
        return 2 * x * torch.from_numpy(mask).to(x.dtype)


class Residual(nn.Sequential):
    """A residual branch whose last layer is small, as after its initialisation."""

    def __init__(self, size, *behind, out=2):
        last = nn.Linear(16, out)
        super().__init__(nn.Linear(2, 16), nn.Tanh(), NumpyDropout(), last, *behind)
        with torch.no_grad():
            last.weight.mul_(size)
            last.bias.mul_(size)


class Twice(AdditiveCoupling):
    """Is rebuilt by the default, with two evaluations."""

    rebuild = InvertibleModule.rebuild


def alternate(make, **options):
    """Four layers that take turns with the streams."""
    layers = [layer for _ in range(4) for layer in (make(), Swap())]
    return InvertibleSequential(*layers, checkpoint=Rebuild(**options))


def shifts(size, **options):
    return alternate(lambda: AdditiveCoupling(Residual(size)), **options)


WAYS = {
    "one evaluation": shifts,
    "the default": lambda size: alternate(lambda: Twice(Residual(size))),
    "anchors": lambda size: shifts(size, anchor_every=2),
    "stored inputs": lambda size: shifts(size, anchor_every=1),
    "a ReversibleBlock": lambda size: InvertibleSequential(
        *(ReversibleBlock(Residual(size), Residual(size)) for _ in range(2)), checkpoint=True
    ),
    "an affine map": lambda size: alternate(lambda: AffineCoupling(Residual(size, out=4))),
    "an affine map, by the default": lambda size: alternate(
        lambda: TwiceEvaluated(Residual(size, out=4))
    ),
    "an affine map, from stored inputs": lambda size: alternate(
        lambda: AffineCoupling(Residual(size, out=4)), anchor_every=1
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["forward", "inverse"])
@pytest.mark.parametrize("log_det", [False, True])
@pytest.mark.parametrize("size", [1, 1e-2, 1e-4, 0])
@pytest.mark.parametrize("way", WAYS)
def test_randomness_that_torch_does_not_know_is_an_error(way, size, log_det, method, dtype):
    network = WAYS[way](size).to(dtype)
    run = getattr(network, f"{method}_and_log_det" if log_det else method)
    result = run(pair(8, 4, dtype=dtype))
    y1, y2 = result[0] if log_det else result
    with pytest.raises(RebuildError, match=NOT_AS_IT_RAN):
        (y1.sin() + y2.cos()).sum().backward()


@pytest.mark.parametrize(
    "behind", [[nn.ReLU()], [nn.Dropout(0.3)], [nn.BatchNorm1d(2), nn.Tanh()], [nn.LayerNorm(2)]]
)
@pytest.mark.parametrize("batch", [2, 8, 100])
def test_a_layer_of_zeros_hides_nothing_whatever_is_behind_it(behind, batch):
    network = alternate(lambda: AdditiveCoupling(Residual(0, *behind)))
    y1, y2 = network(pair(batch, 4, dtype=torch.float32))
    with pytest.raises(RebuildError, match=NOT_AS_IT_RAN):
        (y1.sin() + y2.cos()).sum().backward()


class NumpyDropPath(nn.Module):
    """Drops examples, and saves nothing but the mask."""

    def forward(self, x):
        mask = np.random.default_rng().random((len(x), 1)) < 0.5
        return x * torch.from_numpy(mask).to(x.dtype)


@pytest.mark.parametrize("size", [1, 0])
def test_masks_of_numpy_behind_a_layer_of_zeros_are_an_error(size):
    def make():
        last = nn.Linear(16, 2)
        nn.init.constant_(last.weight, size)
        nn.init.constant_(last.bias, 0)
        return AdditiveCoupling(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), last, NumpyDropPath()))

    y1, y2 = alternate(make)(pair(64, 4, dtype=torch.float32))
    with pytest.raises(RebuildError, match=NOT_AS_IT_RAN):
        (y1.sin() + y2.cos()).sum().backward()


class Ratio(nn.Module):
    """Multiplies by numbers of Python's generator."""

    def forward(self, x):
        return x * random.uniform(0.5, 2)


class OwnGenerator(nn.Module):
    """Draws from a generator that it does not show."""

    def __init__(self):
        super().__init__()
        self.draw = iter(lambda: torch.rand((), generator=GENERATOR), None)

    def forward(self, x):
        return x * next(self.draw)


GENERATOR = torch.Generator()


class Counter(nn.Module):
    """Counts its calls, and warms up by them."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * min(1, self.calls / 40)


class Recurrent(nn.Module):
    """Keeps what it computed for the next call."""

    def __init__(self):
        super().__init__()
        self.hidden = 0

    def forward(self, x):
        y = (x + self.hidden).tanh()
        self.hidden = y.detach()
        return y


@pytest.mark.parametrize("part", [Ratio, OwnGenerator, Counter, Recurrent])
@pytest.mark.parametrize("size", [1, 0])
def test_state_that_torch_does_not_know_is_an_error(part, size):
    def make():
        last = nn.Linear(4, 2)
        last.weight.data.mul_(size)
        return AdditiveCoupling(nn.Sequential(nn.Linear(2, 4), part(), last))

    y1, y2 = alternate(make).double()(pair(8, 4))
    with pytest.raises(RebuildError, match=NOT_AS_IT_RAN):
        (y1.sin() + y2.cos()).sum().backward()


def test_weights_that_are_written_without_a_count_are_an_error():
    network = body(4, checkpoint=True)
    y = network(body_images())
    for p in network.parameters():
        p.data.mul_(1.5)
    with pytest.raises(RebuildError, match=NOT_AS_IT_RAN):
        y.square().sum().backward()


def test_the_error_says_what_to_do():
    y1, _ = shifts(1)(pair(8, 4, dtype=torch.float32))
    with pytest.raises(RebuildError) as caught:
        y1.sum().backward()
    assert str(caught.value).startswith("layer 6 (AdditiveCoupling) was not rebuilt as it ran: ")
    for part in ("off by", "tolerance of 0.001", "NumPy", "do not use", "Rebuild(debug=True)"):
        assert part in str(caught.value)


def test_debug_names_the_operation():
    y1, _ = shifts(0, debug=True)(pair(8, 4, dtype=torch.float32))
    # Dropout saves its mask, which is what comes out differently first.
    message = r"layer \d .* tensor 4 of \d+ .* shape \(8, 16\), is off by .*: torch.Tensor.mul"
    with pytest.raises(RebuildError, match=message) as caught:
        y1.sum().backward()
    assert "test_comparison.py, line" in str(caught.value)


def test_debug_finds_nothing_in_what_is_right():
    network = body(4, lambda: bottleneck(4, dropout=0.3), checkpoint=Rebuild(debug=True)).double()
    network(body_images()).square().sum().backward()


def test_a_tolerance_can_be_set():
    network = alternate(lambda: AdditiveCoupling(Residual(1e-2)), tolerance=math.inf)
    y1, y2 = network(pair(8, 4, dtype=torch.float32))
    (y1.sin() + y2.cos()).sum().backward()
    network = alternate(lambda: AdditiveCoupling(nn.Linear(2, 2)), tolerance=0)
    y1, y2 = network(pair(8, 4, dtype=torch.float32))
    with pytest.raises(RebuildError, match="with a tolerance of 0"):
        (y1.sin() + y2.cos()).sum().backward()


@pytest.mark.parametrize("tolerance", [-1, math.nan])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance of 0 or more"):
        Rebuild(tolerance=tolerance)


def test_drift_is_told_from_what_changed():
    grow = nn.Linear(2, 2)
    nn.init.constant_(grow.weight, 3.0)
    layers = [layer for _ in range(24) for layer in (AdditiveCoupling(grow), Swap())]
    network = InvertibleSequential(*layers, checkpoint=True)
    y1, _ = network(pair(8, 4, dtype=torch.float32))
    with pytest.raises(RebuildError, match="rounding errors grow"):
        (y1 * 1e-9).tanh().sum().backward()


# --- what is right


def train(network, x, steps=3, **options):
    """Steps of training, with a gradient scaler's overflow in one of them."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(steps):
        with torch.autocast("cpu", **(options or {"enabled": False})):
            y = network(x)
        y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("depth", [2, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dropout", [0, 0.3])
def test_right_networks_never_raise(depth, dtype, dropout):
    network = body(depth, lambda: bottleneck(4, dropout, nn.ReLU), checkpoint=True)
    train(network.to(dtype), body_images(8).to(dtype))


@pytest.mark.parametrize("depth", [2, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_in_sub_networks_never_raises(depth, dtype):
    network = body(depth, lambda: bottleneck(4, 0.3, nn.ReLU), checkpoint=True).float()
    train(network, body_images(8).float(), dtype=dtype)


@pytest.mark.parametrize("batch", [0, 1, 2, 63, 64, 65, 1000])
def test_any_batch_will_do(batch):
    network = body(4, lambda: nn.Conv2d(4, 4, 3, padding=1), checkpoint=True).double()
    network(body_images(batch)).square().sum().backward()


@pytest.mark.parametrize("zeros", [(0,), (1,), (0, 1)])
def test_streams_of_zeros_will_do(zeros):
    def make():
        return AdditiveCoupling(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)))

    x = [part * (i not in zeros) for i, part in enumerate(pair(8, 4))]
    y1, y2 = alternate(make).double()(tuple(x))
    (y1.sin() + y2.cos()).sum().backward()


def test_an_activation_that_is_nearly_always_zero_will_do():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(2, 64), nn.Linear(64, 2)
            nn.init.constant_(self.first.bias, -0.7)

        def forward(self, x):
            return self.last(self.first(x).relu())

    network = alternate(lambda: AdditiveCoupling(Sparse()))
    for _ in range(20):
        y1, y2 = network((torch.randn(16, 2), torch.randn(16, 2)))
        (y1.sin() + y2.cos()).sum().backward()


class Thresholds(nn.Module):
    """Passes gradients on, and rounds: where the input is off by a bit, some results flip."""

    def forward(self, x):
        mask = (x > 0).to(x.dtype)
        return mask * x + (torch.round(4 * x) / 4 - x).detach()


@pytest.mark.parametrize("behind", [False, True])
def test_thresholds_will_do(behind):
    def make():
        parts = [nn.Linear(2, 64), Thresholds(), nn.Linear(64, 2)]
        return AdditiveCoupling(nn.Sequential(*parts, *([Thresholds()] if behind else [])))

    network = alternate(make)
    for _ in range(20):
        y1, y2 = network((torch.randn(64, 2), torch.randn(64, 2)))
        (y1.sin() + y2.cos()).sum().backward()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_was_not_finite_is_no_alarm(value):
    network = body(4, lambda: nn.Conv2d(4, 4, 3, padding=1), checkpoint=True).float()
    x = body_images(8).float()
    x[3, 0, 0, 0] = value
    network(x).square().sum().backward()


def test_overflow_in_half_precision_is_no_alarm():
    class Overflows(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return (self.conv(x).half() * 1e4 * 1e4).float()

    network = body(4, Overflows, checkpoint=True).float()
    network(body_images(8).float()).square().sum().backward()


def test_exact_networks_come_back_in_every_bit():
    def f():
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())

    layers = [x for _ in range(10) for x in (AdditiveCoupling(f(), quantum=2**-12), Swap())]
    network = InvertibleSequential(
        Quantize(2**-12), PixelUnshuffle(2), Split(), *layers, Merge(), checkpoint=True
    )
    network(images(2, 2, 8, 8, dtype=torch.float32)).square().sum().backward()


class Forgetful(nn.Module):
    """Is off by one quantum at one number when it runs again."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(512, 512)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.linear(x)
        wrong = torch.zeros_like(y)
        wrong[0, 77] = 2**-12 * (self.calls > 1)
        return y + wrong


def test_one_flipped_number_is_an_error_in_exact_mode():
    layers = [AdditiveCoupling(Forgetful(), quantum=2**-12)]
    network = InvertibleSequential(Quantize(2**-12), Split(), *layers, Merge(), checkpoint=True)
    y = network(torch.randn(8, 1024))
    with pytest.raises(RebuildError, match="bit for bit"):
        y.sum().backward()


# --- when the verdict comes


def test_outside_of_a_backward_pass_the_verdict_comes_at_once():
    y1, _ = shifts(1)(pair(8, 4, dtype=torch.float32))
    with pytest.raises(RebuildError, match=NOT_AS_IT_RAN):
        _ = y1.grad_fn.next_functions[1][0]._saved_mat1


def test_a_retained_graph_is_judged_each_time():
    y1, _ = shifts(1)(pair(8, 4, dtype=torch.float32))
    for _ in range(2):
        with pytest.raises(RebuildError, match=NOT_AS_IT_RAN):
            y1.sum().backward(retain_graph=True)


def test_gradients_of_a_subset_and_of_gradients_are_judged_too():
    network = shifts(1)
    y1, y2 = network(pair(8, 4, dtype=torch.float32))
    weight = network[4].f[0].weight
    with pytest.raises(RebuildError, match=NOT_AS_IT_RAN):
        torch.autograd.grad((y1 + y2).sum(), weight, create_graph=True)


def test_a_thread_that_draws_beside_a_layer_that_draws_is_named():
    inside, drawn = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, x):
            inside.set()
            drawn.wait()
            return nn.functional.dropout(x, 0.5)

    def draw():
        inside.wait()
        torch.rand(10)
        drawn.set()

    thread = threading.Thread(target=draw)
    thread.start()
    network = body(1, lambda: nn.Sequential(nn.Conv2d(4, 4, 1), Slow()), checkpoint=True)
    y = network(body_images(8))
    thread.join()
    with pytest.raises(RebuildError, match="another thread that draws"):
        y.square().sum().backward()


# --- samples


@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (64, 5), (8, 6, 7, 7), (1000, 3)])
def test_samples_are_spread_over_the_examples(shape):
    x = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    found = sample(x)
    assert found.shape == (COUNT,)
    examples = {int(value) // max(1, x[0].numel() if shape else 1) for value in found}
    assert len(examples) == min(COUNT, shape[0] if shape else 1)


def test_samples_of_a_view_are_those_of_its_values():
    x = torch.randn(4, 6, 5, 5)
    view = x.to(memory_format=torch.channels_last)
    assert torch.equal(sample(x), sample(view))


@pytest.mark.parametrize("x", [torch.empty(0, 3), torch.empty(3, device="meta")])
def test_there_may_be_nothing_to_sample(x):
    assert sample(x) is None
