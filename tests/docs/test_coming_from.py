"""What the guide for users of other libraries says of single options, tried beside these."""

import copy

import pytest
import torch
from torch import nn

from invertible import (
    Flatten,
    InvertibleSequential,
    Merge,
    PixelShuffle,
    Reshape,
    ReversibleBlock,
    Split,
)
from invertible.testing import InversecheckError, inversecheck

# What another library does with torch is its own affair.
pytestmark = pytest.mark.filterwarnings("ignore")


def residual(features=8):
    return nn.Sequential(nn.Linear(features, 32), nn.GELU(), nn.Linear(32, features))


def ours(f, g, dim=1, **options):
    block = ReversibleBlock(f, g)
    return InvertibleSequential(Split(dim=dim), block, Merge(dim=dim), **options)


def gradients(network, residuals, x):
    x = x.clone().requires_grad_()
    network(x.view_as(x)).sin().sum().backward()
    return [x.grad, *(p.grad for f in residuals for p in f.parameters())]


# --- MemCNN


def test_split_dim_of_memcnn_is_that_of_split_and_merge():
    memcnn = pytest.importorskip("memcnn")
    f, g, x = residual(3), residual(3), torch.randn(2, 4, 6)
    theirs = memcnn.AdditiveCoupling(f, g, split_dim=2)
    torch.testing.assert_close(ours(f, g, dim=2)(x), theirs(x))
    assert InvertibleSequential(Split(dim=2), Merge(dim=1))(x).shape == (2, 8, 3)
    with pytest.raises(ValueError, match="dim"):
        Split(dim=0)


def test_the_deprecated_block_of_memcnn_is_a_wrapped_coupling():
    memcnn = pytest.importorskip("memcnn")
    f, g, x = residual(), residual(), torch.randn(4, 16)
    theirs = memcnn.ReversibleBlock(f, g, keep_input=True)
    torch.testing.assert_close(ours(f, g)(x), theirs(x))


def test_a_graph_is_retained_where_memcnn_counts_passes():
    pytest.importorskip("memcnn")
    x = torch.randn(4, 16, requires_grad=True)
    loss = ours(residual(), residual(), checkpoint=True)(x).sin().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, x), first)


def test_masks_are_drawn_again_where_memcnn_asks():
    pytest.importorskip("memcnn")
    f, g = (nn.Sequential(residual(), nn.Dropout(0.5)) for _ in "fg")
    x, found = torch.randn(4, 16), []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        parts = copy.deepcopy((f, g))
        found.append(gradients(ours(*parts, checkpoint=checkpoint), parts, x))
    torch.testing.assert_close(*found)


def test_inversecheck_says_what_memcnn_says_of_a_module():
    memcnn = pytest.importorskip("memcnn")
    theirs = memcnn.AdditiveCoupling(residual(), residual())
    assert memcnn.is_invertible_module(theirs, test_input_shape=(4, 16), atol=1e-5)
    x = torch.randn(4, 16, dtype=torch.float64)
    assert inversecheck(ours(residual(), residual()).double(), x)


def test_a_second_tensor_is_no_second_stream():
    block = InvertibleSequential(ReversibleBlock(residual(), residual()))
    a, b = torch.randn(2, 4, 8)
    assert len(block((a, b))) == 2
    with pytest.raises(TypeError):
        block(a, b)


# --- RevTorch


def test_gradients_of_parameters_are_found_where_revtorch_has_none():
    revtorch = pytest.importorskip("revtorch.revtorch")
    f, g, x = residual(), residual(), torch.randn(4, 16, requires_grad=True)
    parameters = [*f.parameters(), *g.parameters()]
    blocks = nn.ModuleList([revtorch.ReversibleBlock(f, g)])
    theirs = revtorch.ReversibleSequence(blocks)(x).sin().sum()
    assert torch.autograd.grad(theirs, parameters, allow_unused=True) == (None,) * len(parameters)
    loss = ours(f, g, checkpoint=True)(x.detach()).sin().sum()
    assert all(part.any() for part in torch.autograd.grad(loss, parameters))


# --- revlib


def test_memory_modes_of_revlib_have_our_gradients():
    revlib = pytest.importorskip("revlib")
    f, g, x = residual(), residual(), torch.randn(4, 16)
    expected = gradients(ours(*(parts := copy.deepcopy((f, g))), checkpoint=True), parts, x)
    # In the other two, revlib 1.7.2 does not find its own tensors.
    for mode in revlib.MemoryModes.no_savings, revlib.MemoryModes.autograd_function:
        parts = copy.deepcopy((f, g))
        network = revlib.ReversibleSequential(*parts, memory_mode=mode)
        torch.testing.assert_close(gradients(network, parts, x), expected)


def test_split_dim_none_of_revlib_raises_and_a_pair_does_not():
    revlib = pytest.importorskip("revlib")
    f, g, x = residual(), residual(), torch.randn(4, 8)
    with pytest.raises(TypeError, match="must be int, not NoneType"):
        revlib.ReversibleSequential(f, g, split_dim=None)(x.clone().requires_grad_())
    y1, _ = ReversibleBlock(f, g)((x, x))
    torch.testing.assert_close(y1, x + f(x))


def test_a_sub_network_returns_one_tensor_where_that_of_revlib_may_return_a_list():
    class Listed(nn.Module):
        def forward(self, x):
            return [x, 2 * x]

    with pytest.raises((TypeError, ValueError), match="list"):
        ours(Listed(), Listed())(torch.randn(4, 16))


def test_residual_blocks_lose_their_shortcut_as_in_revlib():
    utils = pytest.importorskip("revlib.utils")

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = residual()

        def forward(self, x):
            return x + self.f(x)

    class Plain(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.f = f

        def forward(self, x):
            return self.f(x) - x

    f, g, x = Residual(), Residual(), torch.randn(4, 16)
    theirs = utils.sequential_to_revnet(nn.Sequential(f, g), residual=True)
    torch.testing.assert_close(ours(Plain(f), Plain(g))(x), theirs(x.clone().requires_grad_()))


# --- FrEIA


def test_shapes_of_freia_are_ours():
    modules = pytest.importorskip("FrEIA.modules")
    x, sizes = torch.randn(2, 12, 4, 4), [(12, 4, 4)]

    def theirs(layer):
        return layer([x])[0]

    assert torch.equal(theirs(modules.Flatten(sizes))[0], Flatten(sizes[0])(x))
    reshaped = theirs(modules.Reshape(sizes, output_dims=(3, 64)))[0]
    assert torch.equal(reshaped, Reshape(sizes[0], (3, 64))(x))
    cut = theirs(modules.Split(sizes, section_sizes=(5, 7), dim=0))
    assert all(map(torch.equal, cut, Split((5, 7), dim=1)(x)))
    for legacy, order in (False, "channel-major"), (True, "offset-major"):
        larger = theirs(modules.IRevNetUpsampling(sizes, legacy_backend=legacy))[0]
        assert torch.equal(larger, PixelShuffle(2, order=order)(x))


def test_three_channels_are_cut_alike_by_all():
    modules = pytest.importorskip("FrEIA.modules")
    nice = modules.NICECouplingBlock([(3,)], subnet_constructor=nn.Linear)
    assert (nice.split_len1, nice.split_len2) == (2, 1)


def test_log_determinants_of_freia_are_numbers_where_nothing_scales():
    modules = pytest.importorskip("FrEIA.modules")
    framework = pytest.importorskip("FrEIA.framework")
    network = framework.SequenceINN(16)
    network.append(modules.NICECouplingBlock, subnet_constructor=nn.Linear)
    x = torch.randn(4, 16)
    assert isinstance(network(x)[1], float)
    assert isinstance(network(x, jac=False), tuple)
    assert ours(residual(), residual()).forward_and_log_det(x)[1].shape == (4,)


def test_the_law_of_log_determinants_is_asked_for_alone():
    class Doubles(ReversibleBlock):
        volume_preserving = True

        def forward(self, x):
            return tuple(2 * part for part in x)

    x = tuple(torch.randn(2, 4, 8, dtype=torch.float64))
    block = Doubles(residual(), residual()).double()
    with pytest.raises(InversecheckError, match="log-determinant"):
        inversecheck(block, x, laws="log-determinant")
