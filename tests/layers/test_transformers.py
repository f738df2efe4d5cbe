"""Attention in couplings: gradients are those of stored activations, whatever is inside."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from toys import Counting, evaluations, memory_of

from invertible import (
    InvertibleSequential,
    Leapfrog,
    Merge,
    Momentum,
    Quantize,
    ReversibleBlock,
    Split,
)
from invertible.state import tensors

N, T, WIDTH = 3, 6, 8  # the width of one stream
QUANTUM = 2**-16


class Attention(nn.Module):
    """torch's own, with masks and other keys and values from the context."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attend = nn.MultiheadAttention(WIDTH, 2, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor, context=None) -> Tensor:
        context = context or {}
        x = self.norm(x)
        memory = context.get("memory", x)
        return self.attend(
            *(x, memory, memory),
            key_padding_mask=context.get("padding"),
            attn_mask=context.get("mask"),
            need_weights=False,
        )[0]


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding, of (N, heads, T, D)."""
    half = x.shape[-1] // 2
    rates = 100 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).contiguous()


class Fused(nn.Module):
    """Grouped queries, rotated, in one kernel; behind keys and values that are cached."""

    def __init__(self, heads=4, groups=2, dropout=0.0, **options):
        super().__init__()
        self.size = WIDTH // heads
        self.norm = nn.LayerNorm(WIDTH)
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_kv = nn.Linear(WIDTH, 2 * groups * self.size)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.options = options | {"enable_gqa": groups != heads}
        self.dropout = dropout

    def forward(self, x: Tensor, context=None) -> Tensor:
        context = context or {}
        x = self.norm(x)
        q, k, v = map(self.in_heads, (self.to_q(x), *self.to_kv(x).chunk(2, dim=-1)))
        q, k = rotate(q), rotate(k)
        if "cache" in context:
            k, v = (torch.cat(parts, dim=2) for parts in zip(context["cache"], (k, v), strict=True))
        options = self.options | {"dropout_p": self.dropout if self.training else 0.0}
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=context.get("mask"), **options)
        return self.out(y.transpose(1, 2).flatten(2))

    def in_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)


class FeedForward(nn.Sequential):
    def __init__(self, dropout=0.0):
        super().__init__(
            *(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU()),
            *(nn.Dropout(dropout), nn.Linear(16, WIDTH)),
        )


class DropsPaths(nn.Module):
    """Stochastic depth: one draw an example, whose residual is left out or enlarged."""

    def __init__(self, f, rate=0.5):
        super().__init__()
        self.f = f
        self.rate = rate

    def forward(self, x: Tensor, context=None) -> Tensor:
        y = self.f(x) if context is None else self.f(x, context)
        if not self.training:
            return y
        return y * y.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate) / (1 - self.rate)


def padding() -> Tensor:
    return torch.arange(T) >= torch.tensor([T, 4, 1])[:, None]


def causal() -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).triu(1)


def encoder_layer(**options):
    options = {"dropout": 0.1, "batch_first": True, "norm_first": True} | options
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, **options)


class OfEncoderLayer(nn.Module):
    """The attention of a layer that torch offers as a whole."""

    def __init__(self, layer):
        super().__init__()
        self.norm, self.attend, self.drop = layer.norm1, layer.self_attn, layer.dropout1

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.drop(self.attend(x, x, x, need_weights=False)[0])


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


# A sub-network, and the context that it takes.
SUBNETWORKS = {
    "attention": (Attention, None),
    "attention that drops": (lambda: Attention(0.3), None),
    "attention with padding": (Attention, lambda: {"padding": padding()}),
    "attention with causal mask": (Attention, lambda: {"mask": causal()}),
    "attention with both": (Attention, lambda: {"mask": causal(), "padding": padding()}),
    "attention to memory": (Attention, lambda: {"memory": numbers(N, 4, WIDTH)}),
    "fused": (Fused, None),
    "fused and causal": (lambda: Fused(is_causal=True), None),
    "fused without groups": (lambda: Fused(4, 4, is_causal=True), None),
    "fused that drops": (lambda: Fused(dropout=0.3), None),
    "fused with mask": (Fused, lambda: {"mask": ~causal()}),
    "fused with bias": (Fused, lambda: {"mask": numbers(N, 4, T, T)}),
    "fused behind a cache": (
        Fused,
        lambda: {"cache": (numbers(N, 2, 3, 2), numbers(N, 2, 3, 2))},
    ),
    "stochastic depth": (lambda: DropsPaths(Fused(dropout=0.3)), None),
    "stochastic depth with padding": (
        lambda: DropsPaths(Attention(0.3)),
        lambda: {"padding": padding()},
    ),
    "encoder layer": (encoder_layer, None),
    "attention of an encoder layer": (lambda: OfEncoderLayer(encoder_layer()), None),
}


def network(make, conditional, quantum=None, depth=3) -> InvertibleSequential:
    torch.manual_seed(0)
    blocks = [
        ReversibleBlock(make(), FeedForward(0.1), conditional=(conditional, False), quantum=quantum)
        for _ in range(depth)
    ]
    first = [] if quantum is None else [Quantize(quantum)]
    return InvertibleSequential(*first, Split(dim=-1), *blocks, Merge(dim=-1))


def learned(context, dtype):
    """A context in a dtype, whose numbers get gradients."""
    if isinstance(context, dict):
        return {name: learned(part, dtype) for name, part in context.items()}
    if isinstance(context, tuple):
        return tuple(learned(part, dtype) for part in context)
    return context.to(dtype).requires_grad_() if context.is_floating_point() else context


def step(network, make_context=None, dtype=torch.float32, autocast=False):
    """What comes out of a training step, with the gradients of all that has one."""
    context = learned(make_context(), dtype) if make_context else None
    x = numbers(N, T, 2 * WIDTH).to(dtype).requires_grad_()
    leaves = [x, *(part for part in tensors(context) if part.is_floating_point())]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = network(x) if context is None else network(x, context)
    gradients = torch.autograd.grad((y.sin() * y).sum(), [*leaves, *network.parameters()])
    return [y.detach(), *gradients, torch.rand(2)]


def assert_as_stored(network, *inputs, tolerance):
    stored, rebuilt = network, copy.deepcopy(network)
    rebuilt.checkpoint = True
    expected = step(stored, *inputs)
    torch.testing.assert_close(step(rebuilt, *inputs), expected, rtol=tolerance, atol=tolerance)


every_subnetwork = pytest.mark.parametrize("name", SUBNETWORKS)


@every_subnetwork
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_gradients_are_those_of_stored_activations(name, dtype):
    make, context = SUBNETWORKS[name]
    tokens = network(make, context is not None).to(dtype)
    tolerance = 1e-4 if dtype is torch.float32 else 1e-11
    assert_as_stored(tokens, context, dtype, tolerance=tolerance)


@every_subnetwork
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_gradients_of_an_exact_network_are_those_of_stored_activations_bit_for_bit(name, autocast):
    make, context = SUBNETWORKS[name]
    tokens = network(make, context is not None, QUANTUM)
    assert tokens.exact
    assert_as_stored(tokens, context, torch.float32, autocast, tolerance=0)


@every_subnetwork
def test_gradients_under_autocast_are_near_those_of_stored_activations(name):
    make, context = SUBNETWORKS[name]
    tokens = network(make, context is not None)
    assert_as_stored(tokens, context, torch.float32, True, tolerance=5e-2)


@every_subnetwork
def test_tokens_come_back(name):
    make, make_context = SUBNETWORKS[name]
    tokens = network(make, make_context is not None).double().eval()
    context = [learned(make_context(), torch.float64)] if make_context else []
    x = numbers(N, T, 2 * WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(tokens.inverse(tokens(x, *context), *context), x)


@pytest.mark.parametrize(
    "backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=lambda backend: backend.name
)
def test_a_chosen_kernel_is_chosen_again(backend):
    """Around the forward pass alone: backward is called outside of it."""
    chosen = []

    class Chosen(Fused):
        def forward(self, x):
            cuda = torch.backends.cuda  # whose switches are those of the CPU too
            chosen.append((cuda.math_sdp_enabled(), cuda.flash_sdp_enabled()))
            return super().forward(x)

    tokens = network(lambda: Chosen(4, 4, is_causal=True), False)
    tokens.checkpoint = True
    with sdpa_kernel(backend):
        y = tokens(numbers(N, T, 2 * WIDTH).float())
    y.sum().backward()
    assert chosen == 6 * [(backend is SDPBackend.MATH, backend is SDPBackend.FLASH_ATTENTION)]


def test_stochastic_depth_draws_once_an_example():
    drawn = []

    class Seen(DropsPaths):
        def forward(self, x):
            y = super().forward(x)
            drawn.append((y != 0).any(dim=(1, 2)).tolist())
            return y

    tokens = network(lambda: Seen(FeedForward()), False)
    tokens.checkpoint = True
    torch.manual_seed(3)
    tokens(numbers(N, T, 2 * WIDTH).float()).sum().backward()
    forward, backward = drawn[:3], drawn[3:]
    assert backward == forward[::-1]
    assert len({kept for draw in forward for kept in draw}) == 2


def test_blocks_may_share_their_weights():
    attention, feed_forward = Attention(0.1), FeedForward(0.1)
    block = ReversibleBlock(attention, feed_forward)
    other = ReversibleBlock(attention, FeedForward())
    tokens = InvertibleSequential(Split(dim=-1), block, other, block, block, Merge(dim=-1))
    assert_as_stored(tokens.double(), None, torch.float64, tolerance=1e-11)


class Tied(nn.Module):
    """A language model whose last layer has the weights of its first."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 2 * WIDTH)
        self.blocks = network(lambda: Fused(is_causal=True), False)
        self.head = nn.Linear(2 * WIDTH, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.blocks(self.embed(tokens)))


def test_an_embedding_may_be_the_head_as_well():
    model = Tied().double()
    found = []
    for checkpoint in (False, True):
        model.blocks.checkpoint = checkpoint
        torch.manual_seed(1)
        logits = model(torch.arange(N * T).view(N, T) % 11)
        loss = F.cross_entropy(logits.flatten(0, 1), torch.arange(N * T) % 11)
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("make", [Momentum, Leapfrog])
def test_steps_of_full_width_take_tokens_and_masks(make):
    layers = [make(Attention(0.2), 0.5, conditional=True) for _ in range(4)]
    steps = InvertibleSequential(*layers).double()
    found = []
    for checkpoint in (False, True):
        steps.checkpoint = checkpoint
        x = numbers(N, T, WIDTH).requires_grad_()
        torch.manual_seed(1)
        y1, y2 = steps((x, x), {"padding": padding()})
        loss = y1.sin().sum() + y2.cos().sum()
        found.append(torch.autograd.grad(loss, [x, *steps.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_attention_is_evaluated_once_more_and_held_memory_does_not_grow_with_depth():
    def held(depth):
        tokens = network(lambda: Counting(Attention()), False, depth=depth)
        tokens.checkpoint = True
        x = torch.randn(64, 64, 2 * WIDTH, requires_grad=True)
        memory = memory_of(lambda: tokens(x))
        memory.result.sum().backward()
        assert evaluations(tokens) == [2] * depth
        return memory.held

    assert held(8) - held(2) < 64 * 64 * 2 * WIDTH * 4 / 4
