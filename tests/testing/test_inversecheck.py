"""``inversecheck`` passes layers that keep the laws, and finds out those that do not."""

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import AddsContext, Affine, Double, Keep, Logistic, batch_norm_net, images, pair

from invertible import (
    AdditiveCoupling,
    InjectivePad,
    Inverse,
    InvertibleModule,
    InvertibleSequential,
    Permute,
    PixelUnshuffle,
    Split,
    State,
    Swap,
)
from invertible.state import tensors as tensors_in
from invertible.testing import LAWS, InversecheckError, inversecheck
from invertible.testing.strategies import tensors

# --- layers that break a law, each in one way


class Case(NamedTuple):
    """A layer, the law that it breaks, what is said about it, and how it is called."""

    layer: Callable[[], InvertibleModule]
    law: str
    message: str
    x: Callable[[], State]
    context: Callable[[], torch.Tensor | None]

    def inputs(self):
        return self.x(), self.context()


BROKEN: list[Case] = []


def channels_last():
    return images().to(memory_format=torch.channels_last)


def breaks(law, message, x=channels_last, context=lambda: None):
    """Registers a layer with the law that it breaks."""

    def register(layer):
        BROKEN.append(Case(layer, law, message, x, context))
        return layer

    return register


class Coupling(AdditiveCoupling):
    def __init__(self):
        super().__init__(batch_norm_net())


@breaks("state", r"forward returned a list of 2 \(a tensor of shape \(2, 2, 2, 2\), .*expected a")
class ReturnsAList(Keep):
    def forward(self, x):
        return list(x.chunk(2, 1))


@breaks("state", r"forward returned a tuple of 1 \(a tuple of 1 \(a tensor")
class ReturnsANest(Keep):
    def forward(self, x):
        return ((x,),)


@breaks("state", r"forward returned a tuple of 0 \(\), expected")
class ReturnsAnEmptyTuple(Keep):
    def forward(self, x):
        return tuple(x[:0])


@breaks("state", "inverse returned None, expected a tensor or a tuple of tensors")
class ForgetsToReturn(Keep):
    def inverse(self, y):
        pass


@breaks("dtype and device", r"forward returned torch\.float32 on cpu, expected torch\.float64 on c")
class Casts(Keep):
    def forward(self, x):
        return x.float()

    def inverse(self, y):
        return y.double()


@breaks("dtype and device", r"inverse returned torch\.float32 on cpu, expected torch\.float64 on c")
class CastsInInverse(Keep):
    def inverse(self, y):
        return y.float()


@breaks("dtype and device", r"forward returned torch\.float64 on meta, expected torch\.float64 on ")
class MovesToAnotherDevice(Keep):
    def forward(self, x):
        return x.to("meta")


@breaks("input untouched", "forward changed its argument in place")
class DoublesInPlace(Double):
    def forward(self, x):
        return x.mul_(2)


@breaks("input untouched", "inverse changed its argument in place")
class HalvesInPlace(Double):
    def inverse(self, y):
        return y.div_(2)


@breaks("input untouched", "forward changed its argument in place", x=pair)
class ChangesOneStream(Keep):
    def forward(self, x):
        return x[0], x[1].add_(1)

    def inverse(self, y):
        return y[0], y[1] - 1


@breaks("input untouched", "inverse changed the context in place", context=torch.ones(1).double)
class ChangesTheContext(Keep):
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
    def __init__(self):
        super().__init__(2)

    def inverse(self, y):
        return y[:, 2:]


@breaks("inverse undoes forward", r"inverse\(forward\(x\)\) is a tensor of shape \(2, 5, 2, 2\), e")
class CropsTooLittle(InjectivePad):
    def __init__(self):
        super().__init__(2)

    def inverse(self, y):
        return y[:, :-1]


@breaks("inverse undoes forward", r"is wrong by .* at index \(.*\) of stream 0 \(exp", x=pair)
class ForgetsToSubtract(Coupling):
    def inverse(self, y):
        return y


@breaks("inverse undoes forward", r"wrong by 0\.001 at index \(1, 3, 0, 1\) \(expected .*, got")
class MissesOneElement(Keep):
    def inverse(self, y):
        x = y.clone()
        x[1, 3, 0, 1] += 1e-3
        return x


@breaks("inverse undoes forward", r"wrong by 0\.001 at index \(0, 1, 1, 0\) of stream 1 \(", x=pair)
class MissesOneElementOfAPair(Keep):
    def inverse(self, y):
        x2 = y[1].clone()
        x2[0, 1, 1, 0] -= 1e-3
        return y[0], x2


@breaks("inverse undoes forward", r"wrong by inf at index \(1, 2, 1, 1\) \(expected .*, got nan\)")
class ReturnsNaN(Keep):
    def inverse(self, y):
        x = y.clone()
        x[1, 2, 1, 1] = torch.nan
        return x


@breaks("inverse undoes forward", r"is wrong by inf at index .*, got -?inf\)")
class ReturnsInfinity(Keep):
    def inverse(self, y):
        return y / 0


@breaks(
    "forward undoes inverse",
    r"the layer calls itself bijective, and forward\(inverse\(y\)\) is wrong by .* at index",
)
class CallsItselfBijective(InjectivePad):
    bijective = True

    def __init__(self):
        super().__init__(2)


@breaks(
    "memory format", r"forward returned torch\.contiguous_format, expected torch\.channels_last\."
)
class ForgetsChannelsLast(Keep):
    def forward(self, x):
        return x.contiguous()


@breaks(
    "memory format", r"inverse returned torch\.channels_last, expected torch\.contiguous", x=images
)
class MakesChannelsLast(Keep):
    def inverse(self, y):
        return y.contiguous(memory_format=torch.channels_last)


@breaks(
    "no trace",
    r"inverse changed f\.0\.running_mean, f\.0\.running_var, f\.0\.num_batches_tracked\. Evaluate",
    x=pair,
)
class CountsABatchTwice(Coupling):
    def inverse(self, y):
        return y[0] - self.f(y[1]), y[1]


@breaks("no trace", "inverse changed the random generator")
class DrawsNumbers(Keep):
    def inverse(self, y):
        torch.rand(1)
        return y


@breaks("no trace", r"inverse changed the mode of the layer, the mode of f, the mode of f\.0", pair)
class TurnsToEvalMode(Coupling):
    def inverse(self, y):
        x = super().inverse(y)
        self.eval()
        return x


@breaks("no trace", "inverse changed shift")
class TrainsInInverse(Affine):
    def inverse(self, y):
        x = super().inverse(y)
        self.shift.data.zero_()
        return x


@breaks("no trace", "inverse changed cache")
class RegistersABuffer(Keep):
    def inverse(self, y):
        self.register_buffer("cache", y)
        return y


@breaks("differentiable", r"no gradient flows through inverse\(forward\(x\)\)")
class InvertsWithoutGrad(Double):
    @torch.no_grad()
    def inverse(self, y):
        return y / 2


@breaks("differentiable", r"no gradient flows", x=pair)
class DetachesOneStream(Keep):
    def inverse(self, y):
        return y[0], y[1].detach()


@breaks("differentiable", r"respect to stream 1 of the input is wrong by .* of its norm", x=pair)
class DetachesTheShift(Coupling):
    def inverse(self, y):
        x1, x2 = super().inverse((y[0].detach(), y[1].detach()))
        return x1 + y[0] - y[0].detach(), x2 + y[1] - y[1].detach()


@breaks("differentiable", r"no gradient reaches stream 1 of the input", x=pair)
class CutsTheGraph(Keep):
    def forward(self, x):
        return x[0], x[1].detach() + 0 * x[0]


@breaks("log-determinant", r"that of forward is \[16\.5, .*\], the Jacobian's \[8\.0, .*allowed is")
class WrongLogDet(Affine):
    def log_det(self, x):
        return super().log_det(x) + 8.5


@breaks("log-determinant", r"forward_and_log_det returned one of shape \(\), expected \(2,\)")
class OneLogDetForTheBatch(Affine):
    def log_det(self, x):
        return self.log_scale * x.numel()


@breaks("log-determinant", r"that of inverse is \[8\.0, 8\.0\], the Jacobian's \[-8\.0, -8\.")
class ForgetsTheSign(Affine):
    def inverse_and_log_det(self, y):
        return self.inverse(y), self.log_det(y)


@breaks("log-determinant", r"the state of forward_and_log_det is wrong by 1 at index \(")
class AnotherOutput(Affine):
    def forward_and_log_det(self, x):
        return self(x) + 1, self.log_det(x)


@breaks("log-determinant", r"inverse_and_log_det is not defined, the other direction's is")
class OneDirectionOnly(Affine):
    inverse_and_log_det = InvertibleModule.inverse_and_log_det


@breaks("log-determinant", r"forward_and_log_det returned a tensor of shape .*, expected a st")
class ForgetsTheLogDet(Affine):
    def forward_and_log_det(self, x):
        return self(x)


@breaks("log-determinant", r"forward_and_log_det returned a tuple of 2 \(a tensor .*, a float\)")
class LogDetOfAFloat(Affine):
    def log_det(self, x):
        return 0.5 * x[0].numel()


@breaks("log-determinant", r"that of forward is \[0\.0, 0\.0\], the Jacobian's \[5\.5.*, 5\.5")
class CallsItselfVolumePreserving(Double):
    volume_preserving = True

    def forward(self, x):
        return torch.cat([x[:, :2], 2 * x[:, 2:]], 1)

    def inverse(self, y):
        return torch.cat([y[:, :2], y[:, 2:] / 2], 1)


@breaks("log-determinant", r"the Jacobian of forward is not square")
class PadsWithALogDet(InjectivePad):
    volume_preserving = True

    def __init__(self):
        super().__init__(2)


class Coupled(AdditiveCoupling):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Tanh()))


def doubled(state):
    return state[0], 2 * state[1]


class RebuildsElsewhere(Coupled):
    """Rebuilds one direction from another output."""

    inverted: bool

    def rebuild(self, y, replay):
        if replay.inverted is not self.inverted:
            return super().rebuild(y, replay)
        super().rebuild(doubled(y), replay)
        with torch.no_grad():
            return self.forward(y) if self.inverted else self.inverse(y)


@breaks("rebuilding", r"of forward makes the gradient of .* wrong by .*Check rebuild", x=pair)
class RebuildsForwardElsewhere(RebuildsElsewhere):
    inverted = False


@breaks("rebuilding", r"of inverse makes the gradient of .* wrong by .*Check rebuild", x=pair)
class RebuildsInverseElsewhere(RebuildsElsewhere):
    inverted = True


@breaks("rebuilding", r"forward cannot be rebuilt: ", x=pair)
class RebuildsNothing(Coupled):
    def rebuild(self, y, _):
        with torch.no_grad():
            return self.inverse(y)


def made(layer):
    torch.manual_seed(0)
    return layer().double()


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.layer.__name__)


@each(BROKEN)
def test_a_broken_layer_is_found_out(case):
    name = f"^{case.layer.__name__} breaks the law {case.law!r}: "
    for laws in (None, [case.law]):  # no other law speaks first, nor does this one need another
        with pytest.raises(InversecheckError, match=f"{name}.*{case.message}"):
            inversecheck(made(case.layer), *case.inputs(), laws=laws)


@each(BROKEN)
def test_a_broken_layer_is_reported_as_false_on_request(case):
    assert inversecheck(made(case.layer), *case.inputs(), raise_exception=False) is False


def test_every_law_is_broken_once():
    assert {case.law for case in BROKEN} == set(LAWS)


def test_a_singular_jacobian_allows_no_log_determinant():
    class Collapses(Keep):
        def forward(self, x):
            return 0 * x

    with pytest.raises(InversecheckError, match=r"Jacobian's \[-inf, -inf\]"):
        inversecheck(Collapses(), images(), laws=["log-determinant"])


# --- nothing is left behind

RIGHT = [
    Case(Coupling, "", "", pair, lambda: None),
    Case(Affine, "", "", images, lambda: None),
]


@each([*RIGHT, *BROKEN])
@pytest.mark.parametrize("training", [True, False])
def test_no_side_effect_is_left(case, training):
    layer, (x, context) = made(case.layer).train(training), case.inputs()
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = everything(layer)
    streams = [(stream, stream.clone(), stream._version) for stream in tensors_in(x)]
    inversecheck(layer, x, context, y=x, raise_exception=False)
    torch.testing.assert_close(everything(layer), before, rtol=0, atol=0)
    for stream, value, version in streams:
        assert torch.equal(stream, value)
        assert stream._version == version
        assert not stream.requires_grad


def everything(layer):
    """All of a layer that a check could change, and the random state."""
    return {
        "values": {name: value.clone() for name, value in layer.state_dict().items()},
        "buffers": {name: (id(b), b._version) for name, b in layer.named_buffers()},
        "versions": {name: (id(p), p._version) for name, p in layer.named_parameters()},
        "gradients": {name: p.grad.clone() for name, p in layer.named_parameters()},
        "modes": {name: part.training for name, part in layer.named_modules()},
        "random": torch.get_rng_state(),
    }


def test_nothing_is_left_when_the_layer_raises():
    class Fails(Coupling):
        def inverse(self, y):
            self.eval()
            self.f(y[1])
            torch.rand(1)
            raise RuntimeError("no inverse today")

    layer = made(Fails)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = everything(layer)
    with pytest.raises(RuntimeError, match="no inverse today"):
        inversecheck(layer, pair(), raise_exception=False)
    torch.testing.assert_close(everything(layer), before, rtol=0, atol=0)


def test_a_mode_changed_in_the_first_evaluation_is_still_seen():
    layer = made(TurnsToEvalMode)
    with pytest.raises(InversecheckError, match="the mode of the layer"):
        inversecheck(layer, pair(), laws=["inverse undoes forward", "no trace"])
    assert layer.training


# --- right layers pass


@given(x=tensors(), training=st.booleans())
def test_a_right_layer_passes_and_true_is_returned(x, training):
    network = InvertibleSequential(PixelUnshuffle(2), Permute.random(4 * x.shape[1], seed=0))
    assert inversecheck(network.train(training), x) is True


def test_a_right_layer_passes_without_a_word(capfd, recwarn):
    inversecheck(Swap(), pair())
    assert capfd.readouterr() == ("", "")
    assert not recwarn


@pytest.mark.parametrize("layer", [Affine(), Inverse(Affine()), InvertibleSequential(Affine())])
def test_a_layer_with_a_log_determinant_passes(layer):
    assert inversecheck(layer.double(), images())


def test_a_log_determinant_defined_without_a_context_argument_passes():
    class Plain(Affine):
        def forward_and_log_det(self, x):
            return self(x), self.log_det(x)

        def inverse_and_log_det(self, y):
            return self.inverse(y), -self.log_det(y)

    assert inversecheck(Plain().double(), images())


def test_a_log_determinant_behind_batch_statistics_is_compared_for_the_whole_batch():
    class Normalize(InvertibleModule):
        """Divides by the deviation of the batch: no inverse, but a Jacobian."""

        def forward(self, x):
            return x / x.std()

        def inverse(self, y):
            return y

        def forward_and_log_det(self, x):
            return self(x), torch.zeros(len(x), dtype=x.dtype)

        def inverse_and_log_det(self, y):
            return y, torch.zeros(len(y), dtype=y.dtype)

    with pytest.raises(InversecheckError, match=r"that of forward is \[0\.0\], the Jac"):
        inversecheck(Normalize(), images(), laws=["log-determinant"])


def test_a_conditional_layer_is_checked_with_its_context():
    layer = AdditiveCoupling(AddsContext(2), conditional=True).double()
    assert inversecheck(layer, pair(), torch.tensor([1.0, 2.0], dtype=torch.float64))
    with pytest.raises(TypeError, match="is conditional and got no context"):
        inversecheck(layer, pair())


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_are_checked_exactly(dtype):
    x = torch.arange(8).view(2, 4).to(dtype)
    assert inversecheck(Permute([3, 1, 0, 2]), x)

    class OffByOne(Keep):
        def inverse(self, y):
            return y.roll(1)

    with pytest.raises(InversecheckError, match=r"wrong by 1 at index \(0, 0\)"):
        inversecheck(OffByOne(), x)


def test_outputs_between_bounds_are_drawn_from_outputs():
    x = 3 * images()
    assert inversecheck(Logistic(), x)
    assert inversecheck(Logistic(), x, y=torch.full_like(x, 0.25))
    with pytest.raises(InversecheckError, match="forward undoes inverse"):
        inversecheck(Logistic(), x, y=torch.full_like(x, 1.25))  # has no pre-image


def test_a_given_output_is_used():
    class BijectiveOnPositives(Keep):
        def inverse(self, y):
            return y.abs()

    x = images().abs()
    assert inversecheck(BijectiveOnPositives(), x)
    with pytest.raises(InversecheckError, match=r"forward\(inverse\(y\)\) is wrong by 2 at"):
        inversecheck(BijectiveOnPositives(), x, y=-torch.ones_like(x))


def test_an_injective_layer_passes_with_its_left_inverse():
    assert inversecheck(InjectivePad(3), channels_last())


def test_an_empty_batch_passes():
    network = InvertibleSequential(InjectivePad(2, tolerance=0), PixelUnshuffle(2), Split(), Swap())
    assert inversecheck(network, images()[:0])


def test_an_expanded_state_passes():
    assert inversecheck(PixelUnshuffle(2), images(1, 4, 2, 2).expand(3, -1, -1, -1))


def test_a_layer_sees_the_strides_of_the_state():
    class Views(Keep):
        def forward(self, x):
            return x.view(x.shape[0], -1).view(x.shape)  # fails on a slice

    assert inversecheck(Views(), images())
    with pytest.raises(RuntimeError, match="view"):
        inversecheck(Views(), images()[:, :, :1])


def test_nan_in_a_buffer_is_no_trace():
    layer = AdditiveCoupling(batch_norm_net()).double().eval()
    layer.f[0].running_mean[:] = torch.nan
    assert inversecheck(layer, pair(), laws=["no trace"])


def test_a_layer_that_works_in_place_breaks_no_law_but_that():
    laws = [law for law in LAWS if law != "input untouched"]
    assert inversecheck(DoublesInPlace(), images(), laws=laws)
    assert inversecheck(HalvesInPlace(), images(), laws=laws)


def test_the_tolerance_decides():
    class Drifts(Keep):
        def inverse(self, y):
            return y + 1e-6

    assert not inversecheck(Drifts(), images(), raise_exception=False)
    assert inversecheck(Drifts(), images(), tolerance=1e-5)
    assert inversecheck(Drifts(), images(dtype=torch.float32))


# --- what the caller got wrong


@pytest.mark.parametrize("laws", ["inverts", ["inverts"], ["no trace", "inverts"]])
def test_an_unknown_law_is_refused(laws):
    message = r"knows the laws \['state', .*\], got \['inverts'\]\."
    with pytest.raises(ValueError, match=message):
        inversecheck(Swap(), pair(), laws=laws)


def test_one_law_needs_no_list():
    assert inversecheck(Swap(), pair(), laws="no trace")


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (nn.Linear(2, 2), images(), "takes an invertible layer, got a Linear. Subclass"),
        (Swap, pair(), "got the class Swap, not an instance of it"),
        (Swap(), list(pair()), "takes a tensor or a tuple of tensors, got a list of 2"),
        (Swap(), 3.0, "takes a tensor or a tuple of tensors, got a float"),
        (Swap(), (), "takes a tensor or a tuple of tensors, got a tuple of 0"),
    ],
)
def test_what_is_no_layer_or_no_state_is_refused(layer, x, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        inversecheck(layer, x)
