"""What the guide for users of other flow libraries says, tried beside these."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from invertible import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    FactorOut,
    Flow,
    FromTransform,
    Identity,
    Inverse,
    InvertibleLinear,
    InvertibleSequential,
    Logit,
    Merge,
    Permute,
    PixelUnshuffle,
    ReversibleBlock,
    Sigmoid,
    Split,
    Swap,
    Tanh,
)

# What another library does with torch is its own affair.
pytestmark = pytest.mark.filterwarnings("ignore")


def vectors():
    torch.manual_seed(0)
    return torch.randn(5, 4)


def images():
    return torch.randn(2, 4, 4, 4)


class Net(nn.Linear):
    """A sub-network, which nflows calls with a context."""

    def forward(self, x, _=None):
        return super().forward(x)


# --- nflows


@pytest.fixture
def nflows():
    return pytest.importorskip("nflows.transforms")


def coupled(nflows, kind, net):
    """One of nflows' couplings that changes the first two of four features."""
    return getattr(nflows, kind)(torch.tensor([1, 1, 0, 0]), lambda *_: net)


def test_a_flow_of_nflows(nflows):
    flows = pytest.importorskip("nflows.flows")
    distributions = pytest.importorskip("nflows.distributions")
    net, x = Net(2, 2), vectors()
    coupling = coupled(nflows, "AdditiveCouplingTransform", net)
    transform = nflows.CompositeTransform([coupling, nflows.ReversePermutation(4)])
    theirs = flows.Flow(transform, distributions.StandardNormal([4]))
    layers = [Split(), AdditiveCoupling(net), Merge(), Permute(range(4)[::-1])]
    ours = Flow(InvertibleSequential(*layers), event_shape=(4,))
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    assert ours.sample((3,)).shape == theirs.sample(3).shape


def test_contexts_of_nflows(nflows):
    flows = pytest.importorskip("nflows.flows")
    normal = pytest.importorskip("nflows.distributions.normal")
    torch.manual_seed(0)
    embed, encode = nn.Linear(5, 3), nn.Linear(3, 8)

    class Given(nn.Module):
        def forward(self, context):
            loc, log_scale = encode(context).chunk(2, 1)
            return Normal(loc, log_scale.exp())

    theirs = flows.Flow(
        nflows.IdentityTransform(), normal.ConditionalDiagonalNormal([4], encode), embed
    )
    ours, x, context = Flow(Identity(), Given(), event_shape=(4,)), vectors(), torch.randn(5, 5)
    expected = theirs.log_prob(x, context=context)
    torch.testing.assert_close(ours.log_prob(x, embed(context)), expected)
    assert theirs.sample(3, context=context).shape == (5, 3, 4)
    assert ours.sample((3,), embed(context)).shape == (3, 5, 4)
    samples, log_prob = theirs.sample_and_log_prob(3, context=context)
    found = ours(embed(context)).log_prob(samples.transpose(0, 1))
    torch.testing.assert_close(found.T, log_prob)


def test_the_affine_coupling_of_nflows_adds_a_thousandth(nflows):
    net, x = Net(2, 4), vectors()
    theirs, _ = coupled(nflows, "AffineCouplingTransform", net)(x)
    coupling = AffineCoupling(net, scale="glow")
    ours = InvertibleSequential(Split(), coupling, Merge())(x)
    torch.testing.assert_close(ours[:, :2] + 1e-3 * x[:, :2], theirs[:, :2])


def test_act_norm_of_nflows_has_another_shift(nflows):
    theirs, ours = nflows.ActNorm(4).eval(), ActNorm(4, initialised=True)
    nn.init.normal_(theirs.log_scale)
    nn.init.normal_(theirs.shift)
    with torch.no_grad():
        ours.log_scale.copy_(theirs.log_scale)
        ours.shift.copy_(theirs.shift / theirs.log_scale.exp())
    expected = theirs(vectors())
    torch.testing.assert_close(ours.forward_and_log_det(vectors()), expected)


def test_the_linear_layer_of_nflows_has_another_diagonal_and_a_bias(nflows):
    theirs, ours = nflows.LULinear(4, identity_init=False), InvertibleLinear(4)
    lower, upper = theirs._create_lower_upper()
    ours.load_state_dict(
        {
            "permutation": torch.arange(4),
            "sign": torch.ones(4),
            "lower": lower.tril(-1),
            "upper": upper.triu(1),
            "raw_diagonal": (theirs.upper_diag.log() / 7).atanh(),
        }
    )
    torch.testing.assert_close(ours.forward_and_log_det(vectors()), theirs(vectors()))


def test_the_sigmoid_logit_and_tanh_of_nflows(nflows):
    x = vectors()
    for theirs, ours in (("Sigmoid", Sigmoid()), ("Tanh", Tanh())):
        torch.testing.assert_close(ours.forward_and_log_det(x), getattr(nflows, theirs)()(x))
    torch.testing.assert_close(Logit()(x.sigmoid()), nflows.Logit()(x.sigmoid())[0])


def test_squeezing_and_permuting_of_nflows(nflows):
    x = images()
    torch.testing.assert_close(PixelUnshuffle(2)(x), nflows.SqueezeTransform()(x)[0])
    theirs = nflows.RandomPermutation(4)
    ours = Permute(theirs._permutation.tolist())
    torch.testing.assert_close(ours(vectors()), theirs(vectors())[0])
    inverse = nflows.InverseTransform(theirs)
    torch.testing.assert_close(Inverse(ours)(vectors()), inverse(vectors())[0])


def test_the_scales_of_nflows(nflows):
    theirs = nflows.MultiscaleCompositeTransform(2)
    shape = theirs.add_transform(nflows.IdentityTransform(), (4, 4, 4))
    theirs.add_transform(nflows.SqueezeTransform(), shape)
    factored, kept = theirs(images())[0].split([2 * 4 * 4] * 2, 1)
    first, second = FactorOut()(images())
    assert {first.numel(), second.numel()} == {factored.numel(), kept.numel()}


# --- zuko


@pytest.fixture
def zuko():
    return pytest.importorskip("zuko")


def test_a_flow_of_zuko_is_called_alike(zuko):
    context = torch.randn(3)
    theirs = zuko.flows.NSF(2, context=3, transforms=2)(context)
    coupling = AffineCoupling(nn.Bilinear(1, 3, 2), conditional=True)
    layer = InvertibleSequential(Split(), coupling, Swap(), Merge())
    ours = Flow(layer, event_shape=(2,))(context[None])
    x = torch.randn(7, 2)
    assert ours.log_prob(x).shape == theirs.log_prob(x).shape
    for found in (ours, theirs):
        samples, log_prob = found.rsample_and_log_prob((5,))
        torch.testing.assert_close(found.log_prob(samples), log_prob, rtol=1e-3, atol=1e-3)


def test_a_transform_of_zuko_is_a_layer(zuko):
    torch.manual_seed(0)
    widths, heights, slopes = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 7)
    theirs = zuko.transforms.MonotonicRQSTransform(widths, heights, slopes)
    ours, x = FromTransform(theirs), vectors()
    y, log_det = ours.forward_and_log_det(x)
    torch.testing.assert_close(y, theirs(x))
    torch.testing.assert_close(log_det, theirs.log_abs_det_jacobian(x, y).sum(1))
    torch.testing.assert_close(ours.inverse(y), x, rtol=1e-3, atol=1e-3)


def test_a_permutation_of_zuko(zuko):
    order = torch.tensor([2, 0, 3, 1])
    theirs = zuko.transforms.PermutationTransform(order)
    torch.testing.assert_close(Permute(order.tolist())(vectors()), theirs(vectors()))


def test_a_rotation_of_zuko(zuko):
    theirs, ours = zuko.transforms.RotationTransform(torch.randn(4, 4)), FromTransform
    layer = InvertibleLinear(4, "orthogonal")
    x = vectors()
    for rotation, y in ((theirs.R, ours(theirs)(x)), (layer.matrix(), layer(x))):
        torch.testing.assert_close(y, x @ rotation.T)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(4))


# --- normflows


@pytest.fixture
def normflows():
    return pytest.importorskip("normflows")


def test_a_flow_of_normflows_leads_the_other_way(normflows):
    base = normflows.distributions.DiagGaussian(4, trainable=False)
    const = normflows.flows.AffineConstFlow((4,))
    nn.init.normal_(const.s)
    nn.init.normal_(const.t)
    theirs = normflows.NormalizingFlow(base, [const, normflows.flows.Permute(4, "swap")])
    layer = ActNorm(4, initialised=True)
    with torch.no_grad():
        layer.log_scale.copy_(const.s[0])
        layer.shift.copy_(const.t[0] / const.s[0].exp())
    swap = Permute([2, 3, 0, 1])
    ours = Flow(InvertibleSequential(Inverse(swap), Inverse(layer)), event_shape=(4,))
    x = vectors()
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(-ours.log_prob(x).mean(), theirs.forward_kld(x))
    assert ours.sample((3,)).shape == theirs.sample(3)[0].shape


def test_the_reverse_divergence_of_normflows(normflows):
    torch.manual_seed(0)
    base = normflows.distributions.DiagGaussian(2, trainable=False)
    target = normflows.distributions.DiagGaussian(2)
    nn.init.constant_(target.loc, 1.0)
    theirs = normflows.NormalizingFlow(base, [], p=target)
    x, q = Flow(Identity(), event_shape=(2,)).rsample_and_log_prob((20_000,))
    found = (q - target.log_prob(x)).mean()
    torch.testing.assert_close(found, theirs.reverse_kld(20_000), rtol=0.05, atol=0)
    torch.testing.assert_close(found, torch.tensor(1.0), rtol=0.05, atol=0)


def test_squeezing_of_normflows_runs_backward(normflows):
    theirs = normflows.flows.Squeeze()
    torch.testing.assert_close(
        PixelUnshuffle(2)(images_of_one_seed()), theirs.inverse(images_of_one_seed())[0]
    )


def images_of_one_seed():
    torch.manual_seed(1)
    return images()


# --- FrEIA


def test_the_loss_of_freia_is_the_density_but_for_a_constant():
    framework = pytest.importorskip("FrEIA.framework")
    modules = pytest.importorskip("FrEIA.modules")
    network = framework.SequenceINN(4)
    network.append(modules.NICECouplingBlock, subnet_constructor=nn.Linear)
    block, x = network[0], vectors()
    ours = Flow(InvertibleSequential(Split(), ReversibleBlock(block.F, block.G), Merge()))
    z, log_det = network(x)
    loss = (z**2).sum(1) / 2 - log_det
    torch.testing.assert_close(loss + 2 * math.log(2 * math.pi), -ours.log_prob(x))
