"""``Rebuild(context_fn=)``: what a layer keeps of its run, so that less of it runs again."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from invertible import (
    AdditiveCoupling,
    AffineCoupling,
    Inverse,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    Quantize,
    Rebuild,
    ReversibleBlock,
    Split,
    Swap,
    keep_matmuls,
)

KEPT = Rebuild(context_fn=keep_matmuls())


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count[name] = self.count.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def bottleneck(channels=8, inner=2):
    return nn.Sequential(
        nn.Conv2d(channels, inner, 1),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, inner, 3, padding=1),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, channels, 1),
    )


def images():
    torch.manual_seed(1)
    return torch.randn(3, 16, 4, 4, dtype=torch.float64)


def blocks(checkpoint, make=bottleneck, count=2):
    torch.manual_seed(0)
    layers = [ReversibleBlock(make(), make()) for _ in range(count)]
    return InvertibleSequential(Split(), *layers, Merge(), checkpoint=checkpoint).double()


def step(network, x, run="forward"):
    """Gradients and buffers after a step, and the operations of its backward pass."""
    x = x.clone().requires_grad_()
    torch.manual_seed(2)
    y = getattr(network, run)(x) if run != "forward" else network(x)
    loss = sum(part.square().sum() for part in y) if isinstance(y, tuple) else y.square().sum()
    with Operations() as operations:
        loss.backward()
    return [x.grad, *(p.grad for p in network.parameters())], operations.count


def assert_as_stored(make, x, *, run="forward", checkpoint=KEPT, **tolerance):
    expected, _ = step(make(False), x, run)
    found, operations = step(make(checkpoint), x, run)
    torch.testing.assert_close(found, expected, **tolerance)
    return operations


@pytest.mark.parametrize(
    ("checkpoint", "again"),
    [
        (True, 12),
        (Rebuild(context_fn=keep_matmuls(math.inf)), 12),
        (Rebuild(context_fn=keep_matmuls(2 * 9 * 2)), 8),
        (Rebuild(context_fn=keep_matmuls(2 * 8)), 4),
        (KEPT, 0),
    ],
    ids=["rebuilt", "none", "3x3", "3x3 and from 8 channels", "all"],
)
def test_what_was_kept_is_not_computed_again(checkpoint, again):
    operations = assert_as_stored(blocks, images(), checkpoint=checkpoint)
    assert operations.get("convolution", 0) == again


def test_batch_norm_counts_once():
    network = blocks(KEPT)
    step(network, images())
    counts = [int(b) for name, b in network.named_buffers() if "num_batches" in name]
    assert set(counts) == {1}


@pytest.mark.parametrize("run", ["inverse", "forward_and_log_det", "inverse_and_log_det"])
def test_all_four_runs(run):
    def make(checkpoint):
        torch.manual_seed(0)
        couplings = [AffineCoupling(nn.Conv2d(8, 16, 3, padding=1)), Swap()]
        layers = [Split(), *couplings, Inverse(couplings[0]), Swap(), Merge()]
        return InvertibleSequential(*layers, checkpoint=checkpoint).double()

    assert "convolution" not in assert_as_stored(make, images(), run=run)


class Attention(nn.Module):
    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.project = nn.Linear(width, 3 * width)
        self.heads, self.dropout = heads, dropout

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.project(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        return y.transpose(1, 2).reshape(n, t, d)


def transformer(checkpoint, dropout=0.0):
    torch.manual_seed(0)

    def feed_forward():
        return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 8))

    layers = [ReversibleBlock(Attention(8, 2, dropout), feed_forward()) for _ in range(2)]
    return InvertibleSequential(Split(dim=-1), *layers, checkpoint=checkpoint).double()


def tokens():
    return torch.randn(3, 5, 16, dtype=torch.float64)


def test_attention_and_products_of_tokens_are_kept_beside_dropout():
    operations = assert_as_stored(transformer, tokens())
    forward = {name for name in operations if "backward" not in name}
    assert not {name for name in forward if "attention" in name}
    assert "addmm" not in forward
    assert operations["bernoulli_"] == 2


@pytest.mark.parametrize(("flops", "attention"), [(2 * 2 * 5, False), (2 * 2 * 5 + 1, True)])
def test_of_tokens_attention_is_kept_by_its_number_of_keys(flops, attention):
    chosen = Rebuild(context_fn=keep_matmuls(flops))
    operations = assert_as_stored(transformer, tokens(), checkpoint=chosen)
    again = {name for name in operations if "backward" not in name}
    assert bool({name for name in again if "attention" in name}) is attention
    assert "addmm" in again  # those of 8 features


def test_attention_that_draws_is_computed_again():
    operations = assert_as_stored(partial(transformer, dropout=0.5), tokens())
    assert operations["bernoulli_"] == 4


def test_exact_mode_is_as_exact():
    def make(checkpoint):
        torch.manual_seed(0)
        layers = [ReversibleBlock(bottleneck(), bottleneck(), quantum=2**-20) for _ in range(3)]
        layers = [Quantize(2**-20), Split(), *layers, Merge()]
        return InvertibleSequential(*layers, checkpoint=checkpoint).float()

    assert_as_stored(make, images().float(), rtol=0, atol=0)


def test_under_autocast():
    x = images().float()
    found = []
    for checkpoint in (True, KEPT):
        with torch.autocast("cpu", torch.bfloat16):
            y = blocks(checkpoint).float()(x.requires_grad_())
        y.square().sum().backward()
        found.append(x.grad)
        x.grad = None
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=0.02)


class Doubling(InvertibleModule):
    """A layer that is rebuilt by default: inverted, then run again."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def matrix(self):
        return torch.matrix_exp(self.weight / 16)

    def forward(self, x):
        return (x @ self.matrix()).tanh()

    def inverse(self, y):
        return y.atanh() @ self.matrix().inverse()


def test_a_layer_of_ones_own_is_inverted_outside_of_the_contexts():
    def make(checkpoint):
        torch.manual_seed(0)
        return InvertibleSequential(Doubling(), Doubling(), checkpoint=checkpoint).double()

    def matmuls(_, operation, *__, **___):
        kept = operation.overloadpacket.__name__ in ("mm", "linalg_matrix_exp")
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    chosen = Rebuild(context_fn=partial(create_selective_checkpoint_contexts, matmuls))
    x = 0.1 * torch.randn(4, 16, dtype=torch.float64)
    expected, _ = step(make(False), x)
    found, _ = step(make(chosen), x)
    torch.testing.assert_close(found, expected)


def test_contexts_of_any_kind_surround_each_run():
    entered = []

    class Noted:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            entered.append(self.name)

        def __exit__(self, *error):
            pass

    chosen = Rebuild(context_fn=lambda: (Noted("first"), Noted("again")))
    assert_as_stored(partial(blocks, count=1), images(), checkpoint=chosen)
    assert entered == ["first", "first", "again", "again"]


def test_with_anchors():
    anchored = Rebuild(anchor_every=1, context_fn=keep_matmuls())
    assert "convolution" not in assert_as_stored(blocks, images(), checkpoint=anchored)


def test_a_second_backward_pass_is_an_error():
    network = blocks(KEPT)
    loss = network(images()).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward an extra time"):
        loss.backward()


def test_a_kept_result_that_is_changed_in_place_is_an_error():
    def f():
        return nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))

    loss = blocks(KEPT, f)(images()).square().sum()
    with pytest.raises(RuntimeError, match="mutated"):
        loss.backward()


def test_a_layer_that_computes_other_operations_is_an_error():
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x.sin() if self.calls == 1 else x.cos()

    loss = blocks(KEPT, Counting)(images().requires_grad_()).square().sum()
    with pytest.raises(RuntimeError, match=r"While layer .* was rebuilt|cos"):
        loss.backward()


@pytest.mark.parametrize("context_fn", [3, keep_matmuls()()])
def test_no_function_is_an_error(context_fn):
    with pytest.raises(TypeError, match=r"Rebuild takes a context_fn .*keep_matmuls\(\), got"):
        Rebuild(context_fn=context_fn)


@pytest.mark.parametrize("found", [None, (1, 2, 3), (1, 2)])
def test_a_function_that_returns_no_two_contexts_is_an_error(found):
    network = blocks(Rebuild(context_fn=lambda: found))
    with pytest.raises(TypeError, match="must return two contexts"):
        network(images())


@pytest.mark.parametrize("flops", [-1, math.nan, "3", None])
def test_no_number_of_operations_is_an_error(flops):
    with pytest.raises(ValueError, match="takes 0 or more flops_per_value, got"):
        keep_matmuls(flops)


def test_the_sum_of_a_coupling_may_be_among_what_is_kept():
    def all_of_it(*_, **__):
        return CheckpointPolicy.MUST_SAVE

    def make(checkpoint):
        torch.manual_seed(0)
        layer = AdditiveCoupling(nn.Conv2d(8, 8, 1))
        return InvertibleSequential(Split(), layer, checkpoint=checkpoint).double()

    chosen = Rebuild(context_fn=partial(create_selective_checkpoint_contexts, all_of_it))
    assert_as_stored(make, images(), checkpoint=chosen)
