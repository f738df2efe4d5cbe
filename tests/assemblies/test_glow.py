"""Glow with two levels and a conditional prior computes what a plain one does, from its weights."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import assert_same_gradients, both, images, memory_of

from invertible import (
    ActNorm,
    AffineCoupling,
    Coupling,
    ElementwiseMap,
    FactorOut,
    Flow,
    InvertibleLinear,
    InvertibleSequential,
    Merge,
    OnStreams,
    PixelUnshuffle,
    Split,
    Swap,
)
from invertible.testing import inversecheck

STEPS = 2

# --- Glow by plain operations, in the conventions of its code


class ZeroConv(nn.Conv2d):
    """Glow's last convolution: zeros at the beginning, and a scale of its own."""

    def __init__(self, channels: int, out: int):
        super().__init__(channels, out, 3, padding=1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.logs = nn.Parameter(torch.zeros(out, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (3 * self.logs).exp()


class PlainStep(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.logs = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.matrix = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])
        self.first = nn.Conv2d(channels // 2, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 1)
        self.last = ZeroConv(8, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        places = x.shape[2] * x.shape[3]
        x = (x + self.bias) * self.logs.exp()
        x = F.conv2d(x, self.matrix[:, :, None, None])
        log_det = places * (self.logs.sum() + self.matrix.slogdet()[1])
        x1, x2 = x.chunk(2, dim=1)
        found = self.last(self.second(self.first(x1).relu()).relu())
        shift, raw = found[:, 0::2], found[:, 1::2]
        scale = (raw + 2).sigmoid()
        return torch.cat((x1, (x2 + shift) * scale), 1), log_det + scale.log().sum((1, 2, 3))


class PlainGlow(nn.Module):
    """Two levels of steps, between them half is factored out under a prior given the other half."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.ModuleList(PlainStep(4 * channels) for _ in range(STEPS))
        self.prior = ZeroConv(2 * channels, 4 * channels)
        self.second = nn.ModuleList(PlainStep(8 * channels) for _ in range(STEPS))

    def log_prob(self, x: Tensor) -> Tensor:
        x, total = self.run(self.first, x)
        kept, factored = x.chunk(2, dim=1)
        found = self.prior(kept)
        mean, logs = found[:, 0::2], found[:, 1::2]
        z, log_det = self.run(self.second, kept)
        of_factored = torch.distributions.Normal(mean, logs.exp()).log_prob(factored)
        of_z = torch.distributions.Normal(0, 1).log_prob(z)
        return total + log_det + of_factored.sum((1, 2, 3)) + of_z.sum((1, 2, 3))

    @staticmethod
    def run(steps: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
        x = x.reshape(n, 4 * c, h // 2, w // 2)
        total = x.new_zeros(n)
        for step in steps:
            x, log_det = step(x)
            total = total + log_det
        return x, total


# --- the same by composition


class Standardised(ElementwiseMap):
    """The mean and the logarithm of the deviation, as those of a Gaussian prior."""

    parameters_per_value = 2

    def forward_and_log_det(self, x, parameters):
        mean, logs = parameters
        return (x - mean) * (-logs).exp(), -logs

    def inverse_and_log_det(self, y, parameters):
        mean, logs = parameters
        return mean + y * logs.exp(), logs


def step(channels: int) -> list:
    f = nn.Sequential(
        nn.Conv2d(channels // 2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, channels, 3, padding=1),
    )
    nn.init.zeros_(f[-1].weight)
    nn.init.zeros_(f[-1].bias)
    coupling = [Swap(), AffineCoupling(f, scale="glow", shift_first=True), Swap()]
    return [ActNorm(channels), InvertibleLinear(channels), Split(), *coupling, Merge()]


def level(channels: int, steps: int = STEPS) -> list:
    return [PixelUnshuffle(2), *(layer for _ in range(steps) for layer in step(channels))]


def glow(channels: int, steps: int = STEPS, **options) -> InvertibleSequential:
    f = nn.Conv2d(2 * channels, 4 * channels, 3, padding=1)
    nn.init.zeros_(f.weight)
    nn.init.zeros_(f.bias)
    return InvertibleSequential(
        *level(4 * channels, steps),
        FactorOut(),
        OnStreams((-1, 0), Coupling(f, Standardised())),
        OnStreams(0, InvertibleSequential(*level(8 * channels, steps))),
        **options,
    )


@torch.no_grad()
def load_last(conv: nn.Conv2d, plain: ZeroConv) -> None:
    """Folds the scale into the weights; all shifts come before all scales, not by turns."""
    scale = (3 * plain.logs).exp()
    order = [*range(0, len(scale), 2), *range(1, len(scale), 2)]
    conv.weight.copy_((plain.weight * scale[..., None])[order])
    conv.bias.copy_((plain.bias * scale[:, 0, 0])[order])


@torch.no_grad()
def load_step(layers: list, plain: PlainStep) -> None:
    norm, linear, _, _, coupling, *_ = layers
    norm.load_state_dict(
        {
            "shift": plain.bias.flatten(),
            "log_scale": plain.logs.flatten(),
            "initialised": torch.tensor(True),
        }
    )
    permutation, lower, upper = torch.linalg.lu(plain.matrix)
    diagonal = upper.diagonal()
    linear.load_state_dict(
        {
            "permutation": permutation.argmax(1),
            "sign": diagonal.sign(),
            "lower": lower.tril(-1),
            "upper": upper.triu(1),
            "raw_diagonal": (diagonal.abs().log() / 7).atanh(),
        }
    )
    coupling.f[0].load_state_dict(plain.first.state_dict())
    coupling.f[2].load_state_dict(plain.second.state_dict())
    load_last(coupling.f[4], plain.last)


def load(network: InvertibleSequential, plain: PlainGlow) -> None:
    layers = list(network)
    prior, second = layers[-2].layer, list(layers[-1].layer)
    for steps, found in ((plain.first, layers[1:-3]), (plain.second, second[1:])):
        for i, one in enumerate(steps):
            load_step(found[7 * i : 7 * (i + 1)], one)
    load_last(prior.f, plain.prior)


def trained() -> PlainGlow:
    torch.manual_seed(0)
    plain = PlainGlow(2).double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.1) if parameter.ndim != 2 else None
    return plain


def loaded() -> InvertibleSequential:
    network = glow(2).double()
    load(network, trained())
    return network


def test_log_probabilities_are_those_of_a_plain_glow():
    x = images(3, 2, 8, 8)
    torch.testing.assert_close(Flow(loaded()).log_prob(x), trained().log_prob(x))


def test_latent_values_are_those_of_a_plain_glow():
    x, plain = images(3, 2, 8, 8), trained()
    kept, factored = plain.run(plain.first, x)[0].chunk(2, dim=1)
    found = plain.prior(kept)
    expected = plain.run(plain.second, kept)[0], (factored - found[:, ::2]) / found[:, 1::2].exp()
    torch.testing.assert_close(loaded()(x), expected)


def test_it_keeps_the_laws():
    inversecheck(loaded(), images(2, 2, 8, 8))


def test_it_begins_with_steps_that_normalise_and_shrink():
    """The last convolutions are zero: shifts are 0, and scales sigmoid(2)."""
    torch.manual_seed(0)
    network = glow(2).double()
    first = network[: 1 + 7 * STEPS]
    _, log_det = first.forward_and_log_det(5 + 3 * images(16, 2, 8, 8))
    scales = 64 * STEPS * F.logsigmoid(torch.tensor(2.0, dtype=torch.float64))
    others = sum(
        layer.forward_and_log_det(images(1, 8, 4, 4))[1]
        for layer in first
        if isinstance(layer, ActNorm | InvertibleLinear)
    )
    torch.testing.assert_close(log_det, (scales + others).expand(16))


@pytest.mark.parametrize("way", ["forward_and_log_det", "inverse_and_log_det"])
def test_gradients_are_those_of_stored_activations(way):
    x = images(2, 2, 8, 8)

    def loss(network):
        state = x if way == "forward_and_log_det" else network(x)
        y, log_det = getattr(network, way)(state)
        parts = y if isinstance(y, tuple) else (y,)
        return sum(part.sin().sum() for part in parts) + log_det.square().sum()

    assert_same_gradients(both(loaded), loss)


def test_memory_is_flat_in_the_steps_of_both_levels():
    """But for samples of each layer, some kilobytes, which are compared when it is rebuilt."""

    def held(steps: int, checkpoint: bool) -> float:
        network = glow(2, steps, checkpoint=checkpoint)
        x = torch.randn(32, 2, 32, 32)
        network(x)  # the first batch
        return memory_of(lambda: network.forward_and_log_det(x)).held / x.nbytes

    assert held(16, True) < held(2, True) + 0.5
    assert held(16, False) > 5 * held(2, False)


@pytest.mark.slow
def test_training_by_maximum_likelihood_lowers_the_bits():
    torch.manual_seed(0)
    flow = Flow(glow(1, checkpoint=True), event_shape=(1, 8, 8))
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    texture = torch.linspace(0, 6, 8).sin().outer(torch.linspace(0, 3, 8).cos())
    losses = []
    for _ in range(20):
        x = texture * torch.randn(32, 1, 1, 1) + 0.1 * torch.randn(32, 1, 8, 8)
        loss = flow.bits_per_dim(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert flow.sample((3,)).shape == (3, 1, 8, 8)
