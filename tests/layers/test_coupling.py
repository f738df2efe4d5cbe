"""AdditiveCoupling adds what any module returns, and takes it away again."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import AddsContext, Function, batch_norm_net, copied_in_both_ways, images, pair

from invertible import AdditiveCoupling
from invertible.testing.strategies import pairs


class Attention(nn.Module):
    """Self-attention over all pixels."""

    def __init__(self, channels):
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 1, batch_first=True)

    def forward(self, x):
        pixels = x.flatten(2).transpose(1, 2)
        y, _ = self.attention(pixels, pixels, pixels)
        return y.transpose(1, 2).view_as(x)


@given(x=pairs())
def test_the_first_stream_is_shifted_by_f_of_the_second(x):
    f = nn.Conv2d(x[1].shape[1], x[0].shape[1], 3, padding=1).double()
    y1, y2 = AdditiveCoupling(f)(x)
    torch.testing.assert_close(y1, x[0] + f(x[1]), rtol=0, atol=0)
    assert y2 is x[1]


def test_streams_may_differ_in_channels():
    x = images(2, 1, 2, 2), images(2, 3, 2, 2)
    layer = AdditiveCoupling(nn.Conv2d(3, 1, 1)).double()
    torch.testing.assert_close(layer.inverse(layer(x)), x)


@pytest.mark.parametrize(
    "f", [Attention(2), nn.TransformerEncoderLayer(2, 1, 4, batch_first=True, dropout=0.5)]
)
def test_attention_is_undone(f):
    x = pair(2, 4, 2, 2) if isinstance(f, Attention) else pair(2, 6, 2)
    layer = AdditiveCoupling(f).double()
    state = torch.get_rng_state()
    y = layer(x)
    torch.set_rng_state(state)
    torch.testing.assert_close(layer.inverse(y), x)


def test_hooks_of_f_fire_in_both_directions():
    layer = AdditiveCoupling(nn.Tanh())
    calls = []
    layer.f.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.f.register_forward_hook(lambda *_: calls.append("after"))
    layer.inverse(layer(pair()))
    assert calls == ["before", "after"] * 2


def test_statistics_move_in_forward_and_rest_in_inverse():
    layer = AdditiveCoupling(batch_norm_net()).double()
    norm, reference = layer.f[0], copy.deepcopy(layer.f[0])
    y = layer(pair())
    reference(pair()[1])
    assert norm.num_batches_tracked == 1
    assert torch.equal(norm.running_mean, reference.running_mean)
    mean, version = norm.running_mean, norm.running_mean._version
    torch.testing.assert_close(layer.inverse(y), pair())
    assert norm.running_mean is mean
    assert mean._version == version
    assert torch.equal(norm.running_mean, reference.running_mean)
    assert norm.num_batches_tracked == 1


def test_dropout_is_undone_from_the_random_state_of_forward_and_draws_nothing():
    layer = AdditiveCoupling(nn.Dropout(0.5))
    before = torch.get_rng_state()
    y = layer(pair())
    after = torch.get_rng_state()
    layer.inverse(y)
    assert torch.equal(torch.get_rng_state(), after)
    torch.set_rng_state(before)
    torch.testing.assert_close(layer.inverse(y), pair())


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_an_f_that_changes_its_input_in_place_is_refused(direction):
    layer = AdditiveCoupling(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 2, 1)).double())
    with pytest.raises(RuntimeError, match=r"f \(Sequential\) changed its input in place"):
        getattr(layer, direction)(pair())


def test_an_f_may_work_in_place_behind_its_first_operation():
    f = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True)).double()
    layer = AdditiveCoupling(f)
    torch.testing.assert_close(layer.inverse(layer(pair())), pair())


def test_inference_mode_works():
    layer = AdditiveCoupling(batch_norm_net()).double().eval()
    with torch.inference_mode():
        x = pair()
        torch.testing.assert_close(layer.inverse(layer(x)), x)


def test_the_state_stays_float32_when_f_runs_in_bfloat16():
    layer = AdditiveCoupling(nn.Conv2d(2, 2, 1))
    x = pair(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.f(x[1]).dtype == torch.bfloat16
        y = layer(x)
        back = layer.inverse(y)
    assert {part.dtype for part in (*y, *back)} == {torch.float32}
    torch.testing.assert_close(back, x)


def test_gradients_are_those_of_the_formula():
    layer = AdditiveCoupling(batch_norm_net()).double()
    x = tuple(part.clone().requires_grad_() for part in pair())
    for direction in (layer, layer.inverse):
        assert torch.autograd.gradcheck(lambda *x, run=direction: run(x), x)


@given(training=st.booleans())
def test_parameters_of_f_get_the_gradients_of_a_plain_residual(training):
    layer = AdditiveCoupling(batch_norm_net()).double().train(training)
    plain = copy.deepcopy(layer.f)
    x1, x2 = pair()
    sum(part.sin().sum() for part in layer((x1, x2))).backward()
    (x1 + plain(x2)).sin().sum().backward()
    for found, expected in zip(layer.f.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)


def test_a_context_is_passed_to_f_and_gets_gradients():
    layer = AdditiveCoupling(AddsContext(2), conditional=True).double()
    context = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    x1, x2 = pair()
    y = layer((x1, x2), context)
    assert torch.equal(y[0], x1 + layer.f(x2, context))
    torch.testing.assert_close(layer.inverse(y, context), (x1, x2))
    y[0].sum().backward()
    assert torch.autograd.gradcheck(lambda c: layer((x1, x2), c), context)
    assert context.grad.abs().min() > 0


def test_a_context_may_be_anything():
    layer = AdditiveCoupling(Function(lambda x, context: x * context["scale"]), conditional=True)
    assert torch.equal(layer(pair(), {"scale": 2})[0], pair()[0] + 2 * pair()[1])


@copied_in_both_ways
def test_copies_and_state_dicts_carry_f(again):
    layer = AdditiveCoupling(batch_norm_net()).double()
    assert {key.split(".")[0] for key in layer.state_dict()} == {"f"}
    other = AdditiveCoupling(batch_norm_net()).double()
    other.load_state_dict(layer.state_dict())
    expected = copy.deepcopy(layer)(pair())
    torch.testing.assert_close(other(pair()), expected, rtol=0, atol=0)
    torch.testing.assert_close(again(layer)(pair()), expected, rtol=0, atol=0)


def test_the_same_f_may_serve_two_couplings():
    f = nn.Tanh()
    first, second = AdditiveCoupling(f), AdditiveCoupling(f)
    torch.testing.assert_close(first.inverse(second(pair())), pair())


def test_what_f_is_and_takes_is_shown():
    assert "\n  (f): Tanh()\n" in repr(AdditiveCoupling(nn.Tanh()))
    assert "conditional=True\n  (f): AddsContext" in repr(
        AdditiveCoupling(AddsContext(2), conditional=True)
    )


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (nn.Conv2d(3, 4, 1), torch.zeros(2, 4, 5, 5)),
        (nn.Conv2d(4, 4, 1), torch.zeros(2, 4, 5, 5, dtype=torch.float64)),
    ],
    ids=["channels", "dtype"],
)
def test_an_error_in_the_sub_network_says_what_it_was_given(f, x):
    with pytest.raises(RuntimeError) as caught:
        AdditiveCoupling(f)((x, x))
    assert caught.value.__notes__ == [
        f"In AdditiveCoupling's f (Conv2d), given a second stream of shape (2, 4, 5, 5), {x.dtype} "
        f"on {x.device}."
    ]
