"""``inversecheck`` passes layers that keep the laws, and finds out those that do not."""

import random
import re
from pathlib import Path
from threading import Lock

import pytest
import torch
from broken import (
    BROKEN,
    Case,
    Coupling,
    DoublesInPlace,
    DrawsElsewhere,
    HalvesInPlace,
    TriplesBothWays,
    TurnsToEvalMode,
    channels_last,
)
from hypothesis import given
from hypothesis import strategies as st
from right import RIGHT as RIGHT_LAYERS
from torch import nn
from toys import AddsContext, Affine, Keep, Logistic, batch_norm_net, images, pair

from invertible import (
    AdditiveCoupling,
    InjectivePad,
    Inverse,
    InvertibleModule,
    InvertibleSequential,
    Permute,
    PixelUnshuffle,
    Split,
    Swap,
)
from invertible.state import tensors as tensors_in
from invertible.testing import LAWS, InversecheckError, inversecheck
from invertible.testing.states import mapped
from invertible.testing.strategies import tensors


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
            inversecheck(made(case.layer), **case.inputs(), laws=laws)


@each(BROKEN)
def test_a_broken_layer_is_reported_as_false_on_request(case):
    assert inversecheck(made(case.layer), **case.inputs(), raise_exception=False) is False


def test_every_law_is_broken_once():
    assert {case.law for case in BROKEN} == set(LAWS)


def test_the_laws_are_listed_by_name():
    contract = Path(__file__).parents[2] / "docs" / "api" / "contract.rst"
    for text in (inversecheck.__doc__, contract.read_text()):
        assert [law for law in LAWS if f"``{law}``" not in text] == []


def test_a_singular_jacobian_allows_no_log_determinant():
    class Collapses(Keep):
        def forward(self, x):
            return 0 * x

    with pytest.raises(InversecheckError, match=r"Jacobian's \[-inf, -inf\]"):
        inversecheck(Collapses(), images(), laws=["log-determinant"])


# --- nothing is left behind

RIGHT = [Case(Coupling, x=pair), Case(Affine)]


@each([*RIGHT, *BROKEN])
@pytest.mark.parametrize("training", [True, False])
def test_no_side_effect_is_left(case, training):
    layer, inputs = made(case.layer).train(training), case.inputs()
    x = inputs["x"]
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = everything(layer)
    streams = [(stream, stream.clone(), stream._version) for stream in tensors_in(x)]
    inversecheck(layer, **inputs | {"y": x}, raise_exception=False)
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
    with pytest.raises(
        InversecheckError, match="it raised RuntimeError: no inverse today"
    ) as caught:
        inversecheck(layer, pair())
    assert isinstance(caught.value.__cause__, RuntimeError)
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


@pytest.mark.parametrize("name", RIGHT_LAYERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_right_layer_of_a_user_raises_no_alarm(name, training, dtype):
    case = RIGHT_LAYERS[name]

    def cast(part):
        return part.to(dtype) if part.is_floating_point() else part

    for batch in (1, 2, 3):
        if batch >= case.smallest:
            layer = case.layer().to(dtype).train(training)
            x, context = (mapped(cast, part(batch)) for part in (case.x, case.context))
            # BatchNorm divides rounding errors by a deviation that can be small.
            tolerance = 1e-4 if dtype == torch.float32 else None
            assert inversecheck(layer, x, context, tolerance=tolerance)


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


def test_a_layer_with_a_quantum_is_checked_on_its_grid():
    seen = []

    class Grid(Keep):
        quantum = 2.0**-4

        def forward(self, x):
            seen.append(x)
            return x

    assert inversecheck(Grid(), images(), y=images())
    differing = [x for x in seen if not torch.equal(x * 16, (x * 16).round())]
    assert len(differing) == 2  # the steps of the finite differences


def test_a_layer_that_cannot_be_copied_is_checked():
    class Locked(Affine):
        def __init__(self):
            super().__init__()
            self.lock = Lock()

    assert inversecheck(Locked().double(), images())
    assert inversecheck(Locked(), images(dtype=torch.float32))


def test_gradients_in_another_dtype_are_looked_at_in_float64():
    torch.manual_seed(0)
    with pytest.raises(InversecheckError, match=r"'derivative': .* the parameters is not its"):
        inversecheck(TriplesBothWays(), images(dtype=torch.float32))


def test_errors_of_the_machine_are_no_breach():
    class Large(Keep):
        def forward(self, x):
            raise torch.OutOfMemoryError(str(x.shape))

    with pytest.raises(torch.OutOfMemoryError):
        inversecheck(Large(), images(), raise_exception=False)


def test_an_inverse_may_not_draw_from_other_generators_but_they_are_put_back():
    state = random.getstate()
    assert not inversecheck(DrawsElsewhere(), images(), raise_exception=False)
    assert random.getstate() == state


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

    law = "inverse undoes forward"
    assert inversecheck(Views(), images(), laws=law)
    with pytest.raises(InversecheckError, match="it raised RuntimeError: view"):
        inversecheck(Views(), images()[:, :, :1], laws=law)


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


@pytest.mark.parametrize(("side", "expected"), [(2, 1), (200, 3)])
def test_small_states_are_run_on_one_thread(side, expected):
    class Counts(Keep):
        def forward(self, x):
            found.add(torch.get_num_threads())
            return x

    found, before = set(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert inversecheck(Counts(), images(1, 2, side, side), laws="inverse undoes forward")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert found == {expected}


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
