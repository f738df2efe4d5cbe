"""Layers that break a law, each in one way, and the law that must find it.

``inversecheck`` also has to find others of each kind: these stand for them.
"""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from toys import Affine, Double, Keep, Logistic, batch_norm_net, images, pair

from invertible import AdditiveCoupling, InjectivePad, InvertibleModule, State, is_rebuilding


class Case(NamedTuple):
    """A layer, the law that it breaks, what is said about it, and how it is called."""

    layer: Callable[[], InvertibleModule]
    law: str = ""
    message: str = ""
    x: Callable[[], State] = images
    context: Callable[[], torch.Tensor | None] = lambda: None
    y: Callable[[], State | None] = lambda: None

    def inputs(self):
        return {"x": self.x(), "context": self.context(), "y": self.y()}


BROKEN: list[Case] = []


def channels_last():
    return images().to(memory_format=torch.channels_last)


def one():
    return images(1, 4, 2, 2)


def numbers():
    return torch.ones(3).double()


def breaks(law, message, x=channels_last, **inputs):
    """Registers a layer with the law that it breaks."""

    def register(layer):
        BROKEN.append(Case(layer, law, message, x, **inputs))
        return layer

    return register


class Coupling(AdditiveCoupling):
    def __init__(self):
        super().__init__(batch_norm_net())


@breaks("state", r"forward returned a list of 2 \(a tensor of shape \(2, 2, 2, 2\), .*expected a")
class ReturnsAList(Keep):
    """forward returns a list."""

    def forward(self, x):
        return list(x.chunk(2, 1))


@breaks("state", r"forward returned a tuple of 1 \(a tuple of 1 \(a tensor")
class ReturnsANest(Keep):
    """forward returns a tuple in a tuple."""

    def forward(self, x):
        return ((x,),)


@breaks("state", r"forward returned a tuple of 0 \(\), expected")
class ReturnsAnEmptyTuple(Keep):
    """forward returns a tuple of nothing."""

    def forward(self, x):
        return tuple(x[:0])


@breaks("state", "inverse returned None, expected a tensor or a tuple of tensors")
class ForgetsToReturn(Keep):
    """inverse returns None."""

    def inverse(self, y):
        pass


@breaks("dtype and device", r"forward returned torch\.float32 on cpu, expected torch\.float64 on c")
class Casts(Keep):
    """forward returns float32 for float64."""

    def forward(self, x):
        return x.float()

    def inverse(self, y):
        return y.double()


@breaks("dtype and device", r"inverse returned torch\.float32 on cpu, expected torch\.float64 on c")
class CastsInInverse(Keep):
    """inverse returns float32 for float64."""

    def inverse(self, y):
        return y.float()


@breaks("dtype and device", r"forward returned torch\.float64 on meta, expected torch\.float64 on ")
class MovesToAnotherDevice(Keep):
    """forward returns a tensor on another device."""

    def forward(self, x):
        return x.to("meta")


@breaks("input untouched", "forward changed its argument in place")
class DoublesInPlace(Double):
    """forward writes into its input."""

    def forward(self, x):
        return x.mul_(2)


@breaks("input untouched", "inverse changed its argument in place")
class HalvesInPlace(Double):
    """inverse writes into its input."""

    def inverse(self, y):
        return y.div_(2)


@breaks("input untouched", "forward changed its argument in place", x=pair)
class ChangesOneStream(Keep):
    """forward writes into one stream of its input."""

    def forward(self, x):
        return x[0], x[1].add_(1)

    def inverse(self, y):
        return y[0], y[1] - 1


@breaks("input untouched", "inverse changed the context in place", context=torch.ones(1).double)
class ChangesTheContext(Keep):
    """inverse writes into the context."""

    conditional = True

    def forward(self, x, context):
        return x + context

    def inverse(self, y, context):
        return y + context.neg_()


@breaks(
    "inverse undoes forward",
    r"inverse\(forward\(x\)\) is wrong by [\d.]+ at index \(\d, \d, \d, \d\) \(expected -?[\d.]+, "
    r"got -?[\d.]+\); allowed is [\d.]+e-11, 3\.7e-11 times the largest magnitude",
)
class CropsTheWrongSide(InjectivePad):
    """inverse crops the channels that were there."""

    def __init__(self):
        super().__init__(2)

    def inverse(self, y):
        return y[:, 2:]


@breaks("inverse undoes forward", r"inverse\(forward\(x\)\) is a tensor of shape \(2, 5, 2, 2\), e")
class CropsTooLittle(InjectivePad):
    """inverse crops a channel too few."""

    def __init__(self):
        super().__init__(2)

    def inverse(self, y):
        return y[:, :-1]


@breaks("inverse undoes forward", r"is wrong by .* at index \(.*\) of stream 0 \(exp", x=pair)
class ForgetsToSubtract(Coupling):
    """inverse leaves the shift in."""

    def inverse(self, y):
        return y


@breaks("inverse undoes forward", r"wrong by 0\.001 at index \(1, 3, 0, 1\) \(expected .*, got")
class MissesOneElement(Keep):
    """inverse is wrong at one place."""

    def inverse(self, y):
        x = y.clone()
        x[1, 3, 0, 1] += 1e-3
        return x


@breaks("inverse undoes forward", r"wrong by 0\.001 at index \(0, 1, 1, 0\) of stream 1 \(", x=pair)
class MissesOneElementOfAPair(Keep):
    """inverse is wrong at one place of the second stream."""

    def inverse(self, y):
        x2 = y[1].clone()
        x2[0, 1, 1, 0] -= 1e-3
        return y[0], x2


@breaks("inverse undoes forward", r"wrong by inf at index \(1, 2, 1, 1\) \(expected .*, got nan\)")
class ReturnsNaN(Keep):
    """inverse returns NaN at one place."""

    def inverse(self, y):
        x = y.clone()
        x[1, 2, 1, 1] = torch.nan
        return x


@breaks("inverse undoes forward", r"is wrong by inf at index .*, got -?inf\)")
class ReturnsInfinity(Keep):
    """inverse divides by zero."""

    def inverse(self, y):
        return y / 0


@breaks(
    "forward undoes inverse",
    r"the layer calls itself bijective, and forward\(inverse\(y\)\) is wrong by .* at index",
)
class CallsItselfBijective(InjectivePad):
    """It pads, and says that every output has a pre-image."""

    bijective = True

    def __init__(self):
        super().__init__(2)


@breaks(
    "memory format", r"forward returned torch\.contiguous_format, expected torch\.channels_last\."
)
class ForgetsChannelsLast(Keep):
    """forward returns torch's own memory format."""

    def forward(self, x):
        return x.contiguous()


@breaks(
    "memory format", r"inverse returned torch\.channels_last, expected torch\.contiguous", x=images
)
class MakesChannelsLast(Keep):
    """inverse returns channels last."""

    def inverse(self, y):
        return y.contiguous(memory_format=torch.channels_last)


@breaks(
    "no trace",
    r"inverse changed f\.0\.running_mean, f\.0\.running_var, f\.0\.num_batches_tracked\. Evaluate",
    x=pair,
)
class CountsABatchTwice(Coupling):
    """inverse moves BatchNorm's running statistics."""

    def inverse(self, y):
        return y[0] - self.f(y[1]), y[1]


@breaks("no trace", "inverse changed the random generator")
class DrawsNumbers(Keep):
    """inverse draws a random number."""

    def inverse(self, y):
        torch.rand(1)
        return y


@breaks("no trace", r"inverse changed the mode of the layer, the mode of f, the mode of f\.0", pair)
class TurnsToEvalMode(Coupling):
    """inverse leaves the layer in eval mode."""

    def inverse(self, y):
        x = super().inverse(y)
        self.eval()
        return x


@breaks("no trace", "inverse changed shift")
class TrainsInInverse(Affine):
    """inverse changes a parameter."""

    def inverse(self, y):
        x = super().inverse(y)
        self.shift.data.zero_()
        return x


@breaks("no trace", "inverse changed requires_grad of shift, the gradient of shift")
class FreezesInInverse(Affine):
    """inverse freezes a parameter, and leaves a gradient in it."""

    def inverse(self, y):
        x = super().inverse(y)
        self.shift.requires_grad_(False).grad = torch.ones_like(self.shift)
        return x


@breaks("no trace", "inverse changed cache")
class RegistersABuffer(Keep):
    """inverse keeps its argument in a buffer."""

    def inverse(self, y):
        self.register_buffer("cache", y)
        return y


@breaks("differentiable", r"no gradient flows through inverse\(forward\(x\)\)")
class InvertsWithoutGrad(Double):
    """inverse cuts the graph."""

    @torch.no_grad()
    def inverse(self, y):
        return y / 2


@breaks("differentiable", r"no gradient flows", x=pair)
class DetachesOneStream(Keep):
    """inverse cuts the graph of one stream."""

    def inverse(self, y):
        return y[0], y[1].detach()


@breaks("differentiable", r"respect to stream 1 of the input is wrong by .* of its norm", x=pair)
class DetachesTheShift(Coupling):
    """inverse has no gradient through the shift."""

    def inverse(self, y):
        x1, x2 = super().inverse((y[0].detach(), y[1].detach()))
        return x1 + y[0] - y[0].detach(), x2 + y[1] - y[1].detach()


@breaks("differentiable", r"no gradient reaches stream 1 of the input", x=pair)
class CutsTheGraph(Keep):
    """forward cuts the graph of one stream."""

    def forward(self, x):
        return x[0], x[1].detach() + 0 * x[0]


@breaks("log-determinant", r"that of forward is \[16\.5, .*\], the Jacobian's \[8\.0, .*allowed is")
class WrongLogDet(Affine):
    """The log-determinants are off by a constant."""

    def log_det(self, x):
        return super().log_det(x) + 8.5


@breaks("log-determinant", r"forward_and_log_det returned one of shape \(\), expected \(2,\)")
class OneLogDetForTheBatch(Affine):
    """The log-determinants are summed over the batch."""

    def log_det(self, x):
        return self.log_scale * x.numel()


@breaks("log-determinant", r"that of inverse is \[8\.0, 8\.0\], the Jacobian's \[-8\.0, -8\.")
class ForgetsTheSign(Affine):
    """The log-determinant of inverse is that of forward."""

    def inverse_and_log_det(self, y):
        return self.inverse(y), self.log_det(y)


@breaks("log-determinant", r"the state of forward_and_log_det is wrong by 1 at index \(")
class AnotherOutput(Affine):
    """forward_and_log_det returns another state than forward."""

    def forward_and_log_det(self, x):
        return self(x) + 1, self.log_det(x)


@breaks("log-determinant", r"inverse_and_log_det is not defined, the other direction's is")
class OneDirectionOnly(Affine):
    """inverse_and_log_det is missing."""

    inverse_and_log_det = InvertibleModule.inverse_and_log_det


@breaks("log-determinant", r"forward_and_log_det returned a tensor of shape .*, expected a st")
class ForgetsTheLogDet(Affine):
    """forward_and_log_det returns the state alone."""

    def forward_and_log_det(self, x):
        return self(x)


@breaks("log-determinant", r"forward_and_log_det returned a tuple of 2 \(a tensor .*, a float\)")
class LogDetOfAFloat(Affine):
    """The log-determinant is a Python number."""

    def log_det(self, x):
        return 0.5 * x[0].numel()


@breaks("log-determinant", r"that of forward is \[0\.0, 0\.0\], the Jacobian's \[5\.5.*, 5\.5")
class CallsItselfVolumePreserving(Double):
    """It doubles half of the channels, and says that it keeps the volume."""

    volume_preserving = True

    def forward(self, x):
        return torch.cat([x[:, :2], 2 * x[:, 2:]], 1)

    def inverse(self, y):
        return torch.cat([y[:, :2], y[:, 2:] / 2], 1)


@breaks("log-determinant", r"the Jacobian of forward is not square")
class PadsWithALogDet(InjectivePad):
    """It pads, and has a log-determinant."""

    volume_preserving = True

    def __init__(self):
        super().__init__(2)


class Coupled(AdditiveCoupling):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Tanh()))


def doubled(state):
    return state[0], 2 * state[1]


class RebuildsElsewhere(Coupled):
    inverted: bool

    def rebuild(self, y, replay):
        if replay.inverted is not self.inverted:
            return super().rebuild(y, replay)
        super().rebuild(doubled(y), replay)
        with torch.no_grad():
            return self.forward(y) if self.inverted else self.inverse(y)


@breaks("rebuilding", r"forward cannot be rebuilt: .* was not rebuilt as it ran", x=pair)
class RebuildsForwardElsewhere(RebuildsElsewhere):
    """forward is rebuilt at another state."""

    inverted = False


@breaks("rebuilding", r"inverse cannot be rebuilt: .* was not rebuilt as it ran", x=pair)
class RebuildsInverseElsewhere(RebuildsElsewhere):
    """inverse is rebuilt at another state."""

    inverted = True


@breaks("rebuilding", r"forward cannot be rebuilt: ", x=pair)
class RebuildsNothing(Coupled):
    """Rebuilding forward only inverts."""

    def rebuild(self, y, _):
        with torch.no_grad():
            return self.inverse(y)


# --- what is wrong beside the numbers at one input


@breaks("input untouched", "forward changed its argument in place")
class WritesTheSameNumbers(Double):
    """forward multiplies its input by 1 in place, which autograd counts as a change."""

    def forward(self, x):
        return 2 * x.mul_(1)


@breaks("input untouched", "forward changed its argument in place")
class WritesWithGradOnly(Double):
    """forward writes into its input while autograd records."""

    def forward(self, x):
        y = 2 * x
        if torch.is_grad_enabled():
            x.detach().mul_(1.5)
        return y


@breaks("state", "it raised AttributeError: .*no attribute 'last'.* put back")
class ReturnsWhatItWasGiven(Keep):
    """inverse returns the state that forward kept in an attribute."""

    def forward(self, x):
        self.last = x.clone()
        return x.tanh()

    def inverse(self, y):
        return self.last + 0 * y


@breaks("inverse undoes forward", "by a copy of the layer that has not run forward, raised KeyErr")
class KeepsItInADict(Keep):
    """inverse returns the state that forward put into a dict."""

    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        self.cache["x"] = x.detach().clone()
        return x.sinh()

    def inverse(self, y):
        return self.cache["x"] + 0 * y


@breaks("inverse undoes forward", "that has not run forward, is wrong by")
class RemembersTheNoise(Keep):
    """inverse subtracts the noise that forward put into a list."""

    def __init__(self):
        super().__init__()
        self.noise = [0.0]

    def forward(self, x):
        self.noise[0] = x.mean().item()
        return x + self.noise[0]

    def inverse(self, y):
        return y - self.noise[0]


@breaks("state", "it raised IndexError: ")
class LooksUpBeyondTheEnd(Keep):
    """inverse raises an error of Python's own."""

    def inverse(self, y):
        return [y][1]


@breaks("state", "it raised AssertionError: never mind")
class Asserts(Keep):
    """inverse fails in an assertion."""

    def inverse(self, y):
        assert y is None, "never mind"


@breaks("differentiable", r"with grad, inverse\(forward\(x\)\) is wrong by 0\.1 at index")
class OtherNumbersWithGrad(Keep):
    """inverse is wrong while autograd records."""

    def inverse(self, y):
        return y + 0.1 * torch.is_grad_enabled()


@breaks("exact on the grid", r"forward takes multiples of 1\.52587890625e-05 off the grid")
class RoundsNothing(Affine):
    """It promises a quantum, and scales."""

    quantum = 2.0**-16


@breaks("exact on the grid", r"inverse does not undo forward bit for bit .* wrong by up to", x=pair)
class MissesTheGridByALittle(AdditiveCoupling):
    """inverse is off by less than the tolerance, where bits are promised."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Tanh()), quantum=2.0**-16)

    def inverse(self, y):
        x1, x2 = super().inverse(y)
        return x1 + 2.0**-45, x2


@breaks("exact on the grid", "forward takes multiples of .* off the grid")
class CallsItselfExact(Affine):
    """It scales, and says that it only moves numbers."""

    exact = True


@breaks("derivative", "gradient of forward with respect to the parameters .* random d", x=pair)
class RoundsWithoutGradient(InvertibleModule):
    """The rounding drops the gradient of the shift in place of letting it through."""

    quantum = 2.0**-16
    volume_preserving = True

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Tanh())

    def shift(self, x2):
        return (self.f(x2) * 2**16).round() / 2**16

    def forward(self, x):
        return x[0] + self.shift(x[1]), x[1]

    def inverse(self, y):
        return y[0] - self.shift(y[1]), y[1]


@breaks("memory format", "in the other memory format, .* is wrong by", x=images)
class WrongWithChannelsLast(Keep):
    """inverse is wrong if channels are last."""

    def inverse(self, y):
        return y if y.is_contiguous() else y + 1e-3


@breaks("memory format", "in the other memory format, forward.x. is wrong by", x=images)
class ScalesChannelsLast(Keep):
    """Both directions scale if channels are last."""

    def forward(self, x):
        return x if x.is_contiguous() else 2 * x

    def inverse(self, y):
        return y if y.is_contiguous() else y / 2


@breaks("memory format", "in the other memory format, it raised RuntimeError: view size", x=images)
class NeedsContiguousStates(Keep):
    """forward views its input."""

    def forward(self, x):
        return x.view(x.shape[0], -1).view(x.shape)


@breaks(
    "memory format", "sliced from one with more channels, .* is wrong by", x=lambda: images(3, 4)
)
class WrongForSlices(Keep):
    """inverse is wrong for what Split returns."""

    def inverse(self, y):
        return y if y.is_contiguous() else y + 1e-3


@breaks("batch size", r"with a batch of 1 in place of 2, inverse\(forward\(x\)\) is wrong by")
class WrongForOneExample(Keep):
    """inverse is wrong for a batch of one."""

    def inverse(self, y):
        return y + 1e-3 * (len(y) == 1)


@breaks("batch size", "with another batch size than 2, it raised IndexError")
class SqueezesOneExample(Keep):
    """forward drops the dimension of a batch of one."""

    def forward(self, x):
        return x + 0 * x.squeeze().sum(3).sum()


@breaks("batch size", r"with a batch of 1 in place of 2, forward\(x\) is wrong by")
class WrongForOddBatches(Keep):
    """Both directions change an odd batch."""

    def forward(self, x):
        return x + len(x) % 2

    def inverse(self, y):
        return y - len(y) % 2


@breaks("batch size", r"with a batch of 2 in place of 1, that of forward_and_log_det is", x=one)
class LogDetOverTheBatch(Affine):
    """The log-determinants are right for a batch of one."""

    def log_det(self, x):
        return super().log_det(x) * len(x)


@breaks("inverse undoes forward", "wrong by 0.001", x=lambda: images(2, 4, 16, 16))
class WrongBeyond256(Keep):
    """inverse is wrong for more than 256 numbers."""

    def inverse(self, y):
        return y + 1e-3 * (y.numel() > 256)


@breaks("log-determinant", "that of forward is .*the Jacobian's", x=lambda: images(2, 6, 8, 8))
class LogDetOfSmallStates(Affine):
    """The log-determinants are wrong for more than 256 numbers in an example."""

    def log_det(self, x):
        return (self.log_scale * min(x[0].numel(), 256)).expand(len(x))


@breaks("no trace", "inverse changed calls")
class CountsInverses(Keep):
    """inverse counts its calls in an attribute."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def inverse(self, y):
        self.calls += 1
        return y


@breaks("no trace", "inverse changed seen")
class KeepsAList(Keep):
    """inverse appends to a list."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def inverse(self, y):
        self.seen.append(y.shape)
        return y


@breaks("no trace", "inverse changed last")
class KeepsAnAttribute(Keep):
    """inverse makes an attribute."""

    def inverse(self, y):
        self.last = y
        return y


@breaks("no trace", "inverse changed generator")
class DrawsFromItsOwnGenerator(Keep):
    """inverse draws from a generator that is an attribute."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def inverse(self, y):
        torch.rand(1, generator=self.generator)
        return y


@breaks("no trace", "inverse changed Python's random generator, NumPy's random generator")
class DrawsElsewhere(Keep):
    """inverse draws from Python's and NumPy's generators."""

    def inverse(self, y):
        random.random()
        np.random.rand()  # noqa: NPY002
        return y


@breaks("no trace", r"inverse_and_log_det changed f\.0\.running_mean", x=pair)
class CountsABatchWithLogDet(Coupling):
    """inverse_and_log_det moves BatchNorm's running statistics."""

    def forward_and_log_det(self, x):
        return self(x), x[0].new_zeros(len(x[0]))

    def inverse_and_log_det(self, y):
        return (y[0] - self.f(y[1]), y[1]), y[0].new_zeros(len(y[0]))


@breaks("no trace", r"forward keeps activations and their graph in KeepsItsOutput\.kept")
class KeepsItsOutput(Keep):
    """forward keeps its output, with its graph, in an attribute."""

    def forward(self, x):
        self.kept = 1 * x
        return self.kept


# --- gradients


@breaks("differentiable", r"inverse\(forward\(x\)\) does not depend on parameter log_scale, and")
class DetachesAParameter(Affine):
    """forward has no gradient for its scale."""

    def forward(self, x):
        return x * self.log_scale.detach().exp() + self.shift


@breaks("differentiable", r"inverse\(forward\(x\)\) does not depend on parameter shift, and its")
class HalvesAGradientInInverse(Affine):
    """inverse has half of the gradient for its shift."""

    def inverse(self, y):
        shift = self.shift / 2 + self.shift.detach() / 2
        return (y - shift) / self.log_scale.exp()


@breaks(
    "differentiable",
    r"forward\(inverse\(y\)\) does not depend on parameter shift",
    y=lambda: channels_last() + 100,
)
class DetachesForLargeOutputs(Affine):
    """inverse has no gradient for the shift of large numbers."""

    def inverse(self, y):
        shift = torch.where(y > 50, self.shift.detach(), self.shift)
        return (y - shift) / self.log_scale.exp()


@breaks("differentiable", r"does not depend on the context, and its gradient", context=numbers)
class DetachesTheContext(InvertibleModule):
    """forward has no gradient for its context."""

    conditional = True

    def forward(self, x, context):
        return x + context.detach().mean()

    def inverse(self, y, context):
        return y - context.mean()


@breaks("derivative", "gradient of forward with respect to the parameters is not its derivative")
class DetachesBothWays(Affine):
    """Neither direction has a gradient for the scale, as under a no_grad that both share."""

    def forward(self, x):
        return x * self.log_scale.detach().exp() + self.shift

    def inverse(self, y):
        return (y - self.shift) / self.log_scale.detach().exp()


@breaks("derivative", "with respect to the parameters is not its derivative: .* it is .*give")
class TriplesBothWays(Affine):
    """Both directions have three times the gradient for the shift."""

    def forward(self, x):
        return x * self.log_scale.exp() + self.tripled()

    def inverse(self, y):
        return (y - self.tripled()) / self.log_scale.exp()

    def tripled(self):
        return 3 * self.shift - 2 * self.shift.detach()


@breaks("derivative", "with respect to the context is not its derivative", context=numbers)
class DetachesTheContextBothWays(InvertibleModule):
    """Neither direction has a gradient for the context."""

    conditional = True

    def forward(self, x, context):
        return x + context.detach().mean()

    def inverse(self, y, context):
        return y - context.detach().mean()


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is scaled."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


@breaks("derivative", "gradient of forward with respect to the input is not its derivative")
class HalvesAndDoubles(Keep):
    """forward halves the gradient of its input, and inverse doubles it."""

    def forward(self, x):
        return Scaled.apply(x, 0.5)

    def inverse(self, y):
        return Scaled.apply(y, 2.0)


@breaks("log-determinant", "gradient of forward_and_log_det with respect to the parameters is not")
class DetachesTheLogDet(Affine):
    """The log-determinants have no gradient."""

    def log_det(self, x):
        return super().log_det(x).detach()


@breaks("log-determinant", "gradient of forward_and_log_det with respect to the input is not its")
class DetachesTheInputOfTheLogDet(Logistic):
    """The log-determinants have no gradient for the state."""

    def log_det(self, x):
        return super().log_det(x.detach())


@breaks("log-determinant", "of inverse_and_log_det with respect to the parameters is not its deriv")
class DetachesTheLogDetOfInverse(Affine):
    """The log-determinant of inverse has no gradient."""

    def inverse_and_log_det(self, y):
        return self.inverse(y), -self.log_det(y).detach()


@breaks("log-determinant", "of forward_and_log_det with respect to the input is not its derivativ")
class DetachesTheStateOfTheLogDet(Affine):
    """forward_and_log_det returns a state without a graph."""

    def forward_and_log_det(self, x):
        return self(x).detach(), self.log_det(x)


@breaks("log-determinant", "with respect to the context is not its derivative", context=numbers)
class DetachesTheContextOfTheLogDet(InvertibleModule):
    """The log-determinants have no gradient for the context."""

    conditional = True

    def forward(self, x, context):
        return x * context.mean().exp()

    def inverse(self, y, context):
        return y * (-context.mean()).exp()

    def forward_and_log_det(self, x, context):
        return self(x, context), self.log_det(x, context)

    def inverse_and_log_det(self, y, context):
        return self.inverse(y, context), -self.log_det(y, context)

    def log_det(self, x, context):
        return (context.detach().mean() * x[0].numel()).expand(len(x))


def large():
    return images(2, 3, 20, 20)


@breaks(
    "log-determinant", r"add up to 0 over the batch, and that of its Jacobian is about 1200", large
)
class CallsItselfVolumePreservingAtAnySize(Keep):
    """It scales, and says that it keeps the volume."""

    def forward(self, x):
        return x * math.exp(0.5)

    def inverse(self, y):
        return y * math.exp(-0.5)


@breaks("log-determinant", r"add up to 600 over the batch, .* is about 1200; allowed", large)
class LogDetOfHalfOfTheState(Affine):
    """The log-determinants count half of the numbers, if there are many."""

    def log_det(self, x):
        return super().log_det(x) / (2 if x[0].numel() > 1024 else 1)


@breaks("log-determinant", r"add up to .* over the batch, and that of its Jacobian", large)
class ForgetsTheSignBothWays(Logistic):
    """Both log-determinants have the wrong sign, at a size at which no Jacobian is computed."""

    def log_det(self, x):
        return -super().log_det(x)


@breaks("inverse undoes forward", r"with a zero in x, inverse\(forward\(x\)\) is wrong by 0\.1 at ")
class WrongAtZero(Keep):
    """forward jumps at zero, where torch.sign is zero, and inverse knows of two sides only."""

    def forward(self, x):
        return x + 0.1 * torch.sign(x)

    def inverse(self, y):
        return y - 0.1 * torch.where(y >= 0, 1.0, -1.0).to(y.dtype)


@breaks("no trace", r"forward changed the mode of f, f\.0, f\.1, f\.2\.", pair)
class TurnsToEvalModeInForward(Coupling):
    """forward leaves its sub-network in eval mode."""

    def forward(self, x):
        y = super().forward(x)
        self.f.eval()
        return y


@breaks("no trace", "inverse changed .*the gradient of shift")
class ZeroesGradients(Affine):
    """inverse throws away gradients."""

    def inverse(self, y):
        self.zero_grad()
        return super().inverse(y)


class Shifted(InvertibleModule):
    """Adds what a linear map makes of the context."""

    conditional = True

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(3, 1)

    def forward(self, x, context):
        return x + self.shift(context)

    def inverse(self, y, context):
        return y - self.shift(context)

    def shift(self, context):
        return self.f(context)


@breaks("inverse undoes forward", "wrong by", context=numbers)
class IgnoresTheContextInInverse(Shifted):
    """inverse takes another context."""

    def inverse(self, y, context):
        return super().inverse(y, torch.zeros_like(context))


@breaks("no trace", "inverse changed cache", context=numbers)
class CachesTheContext(Shifted):
    """What the first context led to serves all others."""

    cache = None

    def shift(self, context):
        if self.cache is None:
            self.cache = super().shift(context).detach()
        return self.cache


@breaks("differentiable", "does not depend on parameter log_scale, and its gradient is")
class InvertsByABuffer(Affine):
    """inverse divides by a scale that was computed once."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", self.log_scale.detach().double().exp())

    def inverse(self, y):
        return (y - self.shift) / self.scale


@breaks("derivative", "with respect to the parameters is not its derivative")
class ScalesByAnItem(Affine):
    """The scale is a number of Python's, in both directions."""

    def forward(self, x):
        return x * self.log_scale.exp().item()

    def inverse(self, y):
        return y / self.log_scale.exp().item()


@breaks("derivative", "with respect to the input is not its derivative", pair)
class ShiftsByNumPy(Keep):
    """The shift goes through NumPy, where autograd can't follow."""

    def forward(self, x):
        return x[0] + torch.from_numpy(np.sin(x[1].detach().numpy())), x[1]

    def inverse(self, y):
        return y[0] - torch.from_numpy(np.sin(y[1].detach().numpy())), y[1]


@breaks("inverse undoes forward", r"inverse\(forward\(x\)\) is wrong by")
class DrawsUnseeded(Keep):
    """Both directions draw from a generator that nobody seeds."""

    def forward(self, x):
        return x + np.random.default_rng().random()

    def inverse(self, y):
        return y - np.random.default_rng().random()


@breaks("inverse undoes forward", "wrong by")
class SubtractsTheMeanOfTheBatch(Keep):
    """forward lets examples influence each other, and inverse does not know."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


@breaks("inverse undoes forward", r"by a copy of the layer .* is wrong by")
class ReturnsTheInputOfAGlobal(Keep):
    """inverse returns what forward was given last."""

    last = None

    def forward(self, x):
        ReturnsTheInputOfAGlobal.last = x.detach()
        return x.sin()

    def inverse(self, y):
        return 0 * y + self.last


@breaks("differentiable", "with grad, inverse")
class OtherScaleWithGrad(Affine):
    """Both directions scale otherwise while autograd records: one of them is seen without."""

    def forward(self, x):
        return super().forward(x) * (2 if x.requires_grad else 1)

    def inverse(self, y):
        return super().inverse(y / (3 if y.requires_grad else 1))


@breaks("differentiable", "is wrong by")
class DoublesGradientsByAHook(Affine):
    """A hook on the output doubles what goes back."""

    def forward(self, x):
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: 2 * gradient)
        return y


@breaks("log-determinant", r"returned one of torch\.float32, expected torch\.float64 or a wider")
class LogDetInFloat(Keep):
    """The log-determinants are zeros in another dtype."""

    def forward_and_log_det(self, x):
        return x, torch.zeros(len(x))

    def inverse_and_log_det(self, y):
        return y, torch.zeros(len(y))


@breaks("rebuilding", "forward_and_log_det")
class AnotherScaleWhenRebuilt(Affine):
    """forward_and_log_det takes another scale when it is run again."""

    def forward_and_log_det(self, x):
        rebuilt = is_rebuilding()
        return x * (self.log_scale.exp() * (1 + rebuilt)) + self.shift, self.log_det(x)
