"""What a layer says about bad input: its name, what came, what it takes, what to do."""

import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from toys import AddsContext, Double, Function

from invertible import (
    AdditiveCoupling,
    FactorOut,
    Flatten,
    HaarWavelet,
    Identity,
    InjectivePad,
    Merge,
    PairRotation,
    PairScaling,
    Parallel,
    Permute,
    PixelShuffle,
    PixelUnshuffle,
    Reshape,
    Split,
    Swap,
)

X = torch.zeros(2, 3, 4, 4)
TWO = "(a tensor of shape (2, 3, 4, 4), a tensor of shape (2, 3, 4, 4))"
PAIR = "a tuple of 2 (a tensor of shape (2, 3, 4, 4), a tensor of shape (2, 3, 4, 4))"


class Streams(NamedTuple):
    """A state with names, which no layer would give back."""

    first: torch.Tensor
    second: torch.Tensor


def couple(f, x=(X, X)):
    return AdditiveCoupling(f)(x)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (Swap(), "Swap"),
        (Merge(), "Merge"),
        (AdditiveCoupling(nn.Identity()), "AdditiveCoupling"),
        (Parallel(Double(), Double()), "Parallel"),
        (Split().inverse, "Split's inverse"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("x", "error", "got"),
    [
        (X, TypeError, "got a tensor of shape (2, 3, 4, 4). P"),
        ([X, X], TypeError,
         f"got a list of 2 {TWO}. Hand the streams over as a plain tuple: tuple(x)."),
        (Streams(X, X), TypeError,
         f"got a Streams of 2 {TWO}. Hand the streams over as a plain tuple: tuple(x)."),
        (X.max(1), TypeError, "Hand the streams over as a plain tuple: tuple(x)."),
        ({"first": X, "second": X}, TypeError,
         "got a dict. Hand the streams over as a plain tuple: tuple(x.values())."),
        (None, TypeError, "got None. Hand the streams over as a tuple: (x1, x2)."),
        ([X, None], TypeError, "Hand the streams over as a tuple: (x1, x2)."),
        ((X,), ValueError, "got a tuple of 1 (a tensor of shape (2, 3, 4, 4)). "),
        ((X, None), TypeError, "got a tuple of 2 (a tensor of shape (2, 3, 4, 4), None). Each must "
         "be a tensor."),
        ((X, (X, X)), TypeError, f"(a tensor of shape (2, 3, 4, 4), {PAIR}). Each must be a"),
        ((X, np.zeros(3)), TypeError, "(a tensor of shape (2, 3, 4, 4), a ndarray)"),
    ],
)  # fmt: skip
def test_a_layer_of_pairs_refuses_all_else(layer, says, x, error, got):
    with pytest.raises(error, match=re.escape(f"{says} takes a pair of tensors, got ")) as caught:
        layer(x)
    assert got in str(caught.value)


@pytest.mark.parametrize(
    "layer",
    [
        Swap(),
        Swap().inverse,
        Merge(),
        Split().inverse,
        AdditiveCoupling(nn.Identity()),
        AdditiveCoupling(nn.Identity()).inverse,
        Parallel(Double(), Double()),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (X.double(), "takes streams of one dtype, got torch.float32, torch.float64. Bring them "
         "together with .to()."),
        (X.to("meta"), "takes streams of one device, got cpu, meta. Bring them together with "
         ".to()."),
    ],
)  # fmt: skip
def test_streams_of_two_dtypes_or_devices_are_refused(layer, other, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        layer((X, other))


@pytest.mark.parametrize(
    "layer",
    [
        Split(),
        InjectivePad(1),
        Permute([1, 0]),
        PixelUnshuffle(2),
        PixelShuffle(2),
        Flatten((4,)),
        HaarWavelet(),
        PairRotation(2),
        PairScaling(2),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        ((X, X), f"takes a tensor, got {PAIR}. Put Merge() before it to join the streams, or "
         "Parallel(...) to treat each."),
        ([X, X], f"got a list of 2 {TWO}. A state is a tensor or a plain tuple of tensors. Hand "
         "the streams over as a plain tuple: tuple(x)."),
        (Streams(X, X), f"got a Streams of 2 {TWO}. A state is a tensor or a plain tuple of "
         "tensors. Hand the streams over as a plain tuple: tuple(x)."),
        ({"x": X}, "takes a tensor, got a dict. A state is a tensor or a plain tuple of tensors. "
         "Hand the streams over as a plain tuple: tuple(x.values())."),
        ([[1.0, 2.0]], "takes a tensor, got a list of 1 (a list of 2 (a float, a float)). Convert "
         "it with torch.as_tensor."),
        (np.zeros((2, 2)), "takes a tensor, got a ndarray. Convert it with torch.as_tensor."),
        (None, "takes a tensor, got None. "),
    ],
)  # fmt: skip
def test_a_layer_of_tensors_refuses_all_else(layer, x, message):
    with pytest.raises(TypeError, match=re.escape(message)) as caught:
        layer(x)
    assert str(caught.value).startswith(type(layer).__name__)


@pytest.mark.parametrize(
    "layer",
    [
        Merge(),
        InjectivePad(1),
        PixelUnshuffle(2),
        PixelShuffle(2),
        Flatten((4,)),
        Permute([1, 0]),
        HaarWavelet(),
        PairRotation(2),
        PairScaling(2),
    ],
    ids=str,
)
def test_an_inverse_that_gets_no_tensor_asks_for_what_forward_returned(layer):
    message = f"{type(layer).__name__}'s inverse takes a tensor, got {PAIR}. Pass what its forward"
    with pytest.raises(TypeError, match=re.escape(message)):
        layer.inverse((X, X))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("x", "got", "hint"),
    [
        ([X, X], f"a list of 2 {TWO}", "Hand the streams over as a plain tuple: tuple(x)."),
        (Streams(X, X), f"a Streams of 2 {TWO}", "Hand the streams over as a plain tuple: tuple"),
        ({"x": X}, "a dict", "Hand the streams over as a plain tuple: tuple(x.values())."),
        ((X, [X]), "a tuple of 2 (a tensor of shape (2, 3, 4, 4), a list of 1 (a tensor", ""),
        ((), "a tuple of 0 ()", ""),
        (np.zeros((2, 2)), "a ndarray", ""),
        (None, "None", ""),
    ],
)
def test_a_layer_of_any_state_refuses_what_is_none(x, got, hint, inverse):
    layer = Identity()
    whose = "Identity's inverse" if inverse else "Identity"
    message = f"{whose} takes a tensor or a plain tuple of tensors, got {got}"
    hint = hint or ("Pass what its forward" if inverse else "Convert it with torch.as_tensor.")
    with pytest.raises(TypeError, match=re.escape(message)) as caught:
        (layer.inverse if inverse else layer)(x)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "shape", "least"),
    [
        (Split(), (4,), 2),
        (Split(dim=-3), (2, 3, 4), 4),
        (Merge().inverse, (4,), 2),
        (InjectivePad(1, dim=2), (4, 4), 3),
        (InjectivePad(1).inverse, (4,), 2),
        (Permute([1, 0], dim=3), (2, 2, 2), 4),
        (PixelUnshuffle(2), (4, 4), 3),
        (PixelShuffle(2), (4, 4), 3),
        (PixelShuffle(2).inverse, (4, 4), 3),
        (Reshape((4,), (2, 2)), (), 1),
    ],
)
def test_a_missing_batch_dimension_is_told(layer, shape, least):
    message = (
        f"takes a tensor of at least {least} dimensions, batch and channels first, got a tensor of "
        f"shape {shape}. If it is a single example, give it a batch dimension: x.unsqueeze(0)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(torch.zeros(shape))


CALLS = [
    # couplings
    (lambda: AdditiveCoupling(torch.sin), TypeError,
     "AdditiveCoupling takes a torch.nn.Module, got a builtin_function_or_method. A plain function "
     "becomes one as the forward method of a module."),
    (lambda: AdditiveCoupling(nn.ReLU), TypeError,
     "takes a torch.nn.Module, got the class ReLU, not an instance of it."),
    (lambda: couple(nn.Conv2d(3, 4, 1)), ValueError,
     "AdditiveCoupling's f (Conv2d) must return a tensor of the first stream's shape (2, 3, 4, 4), "
     "got a tensor of shape (2, 4, 4, 4) from a second stream of shape (2, 3, 4, 4). Check its "
     "channels, stride and padding."),
    (lambda: couple(nn.AdaptiveAvgPool2d(1)), ValueError,
     "shape (2, 3, 4, 4), got a tensor of shape (2, 3, 1, 1) from"),
    (lambda: couple(Function(lambda x: (x, None))), ValueError,
     "got a tuple of 2 (a tensor of shape (2, 3, 4, 4), None) from a second stream of shape "
     "(2, 3, 4, 4). Wrap it in a module that returns that tensor alone."),
    (lambda: couple(Function(lambda _: None)), ValueError, "got None from a second stream"),
    (lambda: couple(Function(torch.Tensor.double)), ValueError,
     "AdditiveCoupling's f (Function) returned torch.float64, which would change the dtype of the "
     "stream, torch.float32. Cast f or the state."),
    (lambda: couple(nn.ReLU(inplace=True), (X, X.clone())), RuntimeError,
     "AdditiveCoupling's f (ReLU) changed its input in place, and the stream with it. Let its "
     "first operation be out of place, for instance ReLU(inplace=False)."),
    (lambda: AdditiveCoupling(nn.Identity())((X, X), X), TypeError,
     "AdditiveCoupling got a context (a tensor of shape (2, 3, 4, 4)) that nothing in it would "
     "use. Leave the context out, or make a coupling take it: AdditiveCoupling(f, "
     "conditional=True) calls f(x2, context)."),
    (lambda: AdditiveCoupling(AddsContext(3), conditional=True)((X, X)), TypeError,
     "AdditiveCoupling is conditional and got no context. Call it as layer(x, context)."),
    # pads
    *((lambda channels=channels: InjectivePad(channels), ValueError,
       f"InjectivePad takes a whole number of channels, at least 1, got {channels!r}.")
      for channels in (0, -1, 1.5, "3")),
    (lambda: InjectivePad(1, dim=0), ValueError,
     "InjectivePad cannot take dim=0, the batch; channels are dim=1."),
    *((lambda tolerance=tolerance: InjectivePad(1, tolerance=tolerance), ValueError,
       f"InjectivePad takes a tolerance of at least 0, got {tolerance}.")
      for tolerance in (-1.0, float("nan"))),
    (lambda: InjectivePad(3).inverse(X), ValueError,
     "InjectivePad's inverse crops 3 of dimension 1, got only 3 (shape (2, 3, 4, 4)). Pass what "
     "its forward returned."),
    (lambda: InjectivePad(2, tolerance=1e-3).inverse(X - 0.5), ValueError,
     "InjectivePad's inverse would crop values up to 0.5, more than tolerance=0.001: no input has "
     "this output. Features that were edited must keep the padded part at zero."),
    (lambda: InjectivePad(2, tolerance=1e-3).inverse(X * torch.nan), ValueError,
     "InjectivePad's inverse would crop values up to nan, more than tolerance=0.001"),
    # parallel layers
    (Parallel, ValueError,
     "Parallel takes one layer a stream, got none. Identity() leaves a stream as it is."),
    (lambda: Parallel(Swap(), nn.Identity()), TypeError,
     "Parallel takes invertible layers, and layer 1 is an Identity. Put it into a coupling, "
     "AdditiveCoupling(f), or subclass InvertibleModule."),
    (lambda: Parallel(Swap), TypeError, "layer 0 is the class Swap, not an instance of it."),
    (lambda: Parallel([Swap()]), TypeError, "layer 0 is a list of 1 (a Swap)."),
    (lambda: Parallel(Double(), Split((1, 2)))((X, X)), TypeError,
     "Parallel hands one stream to layer 1 (Split) and takes one tensor back, got a tuple of 2 (a "
     "tensor of shape (2, 1, 4, 4), a tensor of shape (2, 2, 4, 4))."),
    (lambda: Parallel(Double(), Double(), Double())(X), TypeError,
     "Parallel takes a tuple of 3 tensors, got a tensor of shape (2, 3, 4, 4). Put Split(sizes) "
     "before it to make them."),
    (lambda: Parallel(Double(), Double())((X, X), X), TypeError, "Parallel got a context (a"),
    # splits and merges
    (lambda: Split(3), TypeError,
     "Split takes the sizes of all streams, for instance sizes=(1, 2), got 3. Leave sizes out for "
     "two halves."),
    *((lambda sizes=sizes: Merge(sizes), ValueError,
       f"Merge takes two or more sizes of at least 1, got sizes={sizes}. Leave sizes out for two "
       "halves. A stream of size 0 would carry nothing.")
      for sizes in ((), (3,), (1, 0), (-1, 2))),
    (lambda: Split(dim=0), ValueError,
     "Split cannot take dim=0, the batch: streams are made of channels (dim=1) or another later "
     "dimension."),
    (lambda: FactorOut((1, 1, 1)), ValueError,
     "FactorOut takes the sizes of two parts, of the one that goes on and of the one that is "
     "factored out, got sizes=(1, 1, 1). Leave sizes out for two halves."),
    (lambda: FactorOut((1, 2))((X,)), ValueError,
     "FactorOut takes a tensor or a tuple of two or more, got a tuple of 1 (a tensor of shape "
     "(2, 3, 4, 4)). Hand that tensor over by itself."),
    (lambda: FactorOut()([X, X]), TypeError,
     f"FactorOut takes a tensor, got a list of 2 {TWO}. A state is a tensor or a plain tuple of "
     "tensors. Hand the streams over as a plain tuple: tuple(x)."),
    (lambda: FactorOut()((X, X)), ValueError,
     "FactorOut halves dimension 1, whose size is odd: 3 (input shape (2, 3, 4, 4)). Give sizes, "),
    (lambda: FactorOut((1, 2))((X, X.double())), ValueError,
     "FactorOut takes streams of one dtype, got torch.float32, torch.float64."),
    (lambda: FactorOut().inverse(X), TypeError,
     "FactorOut's inverse takes a pair of tensors, got a tensor of shape (2, 3, 4, 4). Pass what "
     "its forward returned."),
    (lambda: FactorOut().inverse((X,)), ValueError,
     "FactorOut's inverse takes a pair of tensors, got a tuple of 1"),
    (lambda: FactorOut().inverse((X, X, X[:, :2])), ValueError,
     "FactorOut's inverse joins streams of sizes (3, 3) along dimension 1, alike in all other "
     "dimensions, got shapes (2, 3, 4, 4), (2, 2, 4, 4). For these give sizes=(3, 2)."),
    (lambda: Split()(X), ValueError,
     "Split halves dimension 1, whose size is odd: 3 (input shape (2, 3, 4, 4)). Give sizes, for "
     "instance sizes=(1, 2), or put InjectivePad before it."),
    (lambda: Merge().inverse(X), ValueError, "Merge's inverse halves dimension 1, whose size is"),
    (lambda: Split((1, 3))(X), ValueError,
     "Split cuts dimension 1 into sizes (1, 3), 4 in all, got size 3 (input shape (2, 3, 4, 4)). "
     "Give sizes that add up to it."),
    (lambda: Merge()((X, X[:, :2])), ValueError,
     "Merge joins streams of sizes (3, 3) along dimension 1, alike in all other dimensions, got "
     "shapes (2, 3, 4, 4), (2, 2, 4, 4). For these give sizes=(3, 2)."),
    (lambda: Split((1, 2)).inverse((X, X)), ValueError,
     "Split's inverse joins streams of sizes (1, 2) along dimension 1, alike in all other "
     "dimensions, got shapes (2, 3, 4, 4), (2, 3, 4, 4). For these give sizes=(3, 3)."),
    (lambda: Merge()((X, X[..., :2])), ValueError,
     "got shapes (2, 3, 4, 4), (2, 3, 4, 2). Make the other dimensions equal before it."),
    (lambda: Merge()((X, X[0])), ValueError,
     "got shapes (2, 3, 4, 4), (3, 4, 4). Make the other dimensions equal before it."),
    (lambda: Merge()((X, X[0, 0, 0, 0])), ValueError, "got shapes (2, 3, 4, 4), (). Make the"),
    # permutations
    (lambda: Permute(3), TypeError,
     "Permute takes an order, as Permute([2, 0, 1]) does, got 3. For a random one use "
     "Permute.random(3, seed=0)."),
    *((lambda order=order: Permute(order), ValueError,
       f"Permute takes the numbers 0 to C - 1 in some order, got {order}. For a random order use "
       "Permute.random(channels, seed=0).")
      for order in ([], [0, 2], [1, 2], [0, 0], [-1, 0], [0.5, 1])),
    (lambda: Permute([1, 0], dim=0), ValueError,
     "Permute cannot take dim=0, the batch; channels are dim=1."),
    (lambda: Permute.random(0, seed=0), ValueError,
     "Permute.random takes channels of at least 1, got 0."),
    (lambda: Permute([1, 0])(X), ValueError,
     "Permute orders 2 channels along dimension 1, got 3 (input shape (2, 3, 4, 4)). Give it an "
     "order of that many."),
    (lambda: Permute([1, 0]).inverse(X), ValueError,
     "Permute's inverse orders 2 channels along dimension 1, got 3"),
    # pixel shuffles
    *((lambda factor=factor: PixelUnshuffle(factor), ValueError,
       "PixelUnshuffle takes a whole factor of at least 1, or one for each spatial dimension, got "
       f"{factor!r}.") for factor in (0, -2, 1.5, (), (2, 0), (1.5, 2), "2")),
    (lambda: PixelUnshuffle((2, 2))(X[0]), ValueError,
     "PixelUnshuffle has factors (2, 2) for 2 spatial dimensions, got a tensor of shape "
     "(3, 4, 4). Give it one for each, or a single number for all."),
    (lambda: PixelUnshuffle((2,)).inverse(X), ValueError,
     "PixelUnshuffle's inverse has factors (2,) for 1 spatial dimensions, got a tensor of"),
    (lambda: PixelUnshuffle((1, 3))(X), ValueError,
     "PixelUnshuffle takes sides that are multiples of its factor (1, 3), got a tensor of shape "
     "(2, 3, 4, 4). Crop or pad the sides first."),
    (lambda: PixelShuffle((1, 2))(X), ValueError,
     "PixelShuffle takes a number of channels that is a multiple of 2, the pixels of a block "
     "(1 x 2), got a tensor of shape (2, 3, 4, 4). Put InjectivePad before it."),
    (lambda: PixelShuffle(2, order="space_to_depth"), ValueError,
     "PixelShuffle takes order='channel-major' (as torch.nn.PixelUnshuffle) or 'offset-major' (as "
     "the released i-RevNet), got 'space_to_depth'."),
    (lambda: PixelUnshuffle(2)(X[..., :3]), ValueError,
     "PixelUnshuffle takes sides that are multiples of its factor 2, got a tensor of shape "
     "(2, 3, 4, 3). Crop or pad the sides first."),
    (lambda: PixelShuffle(2).inverse(X[:, :, 1:]), ValueError,
     "PixelShuffle's inverse takes sides that are multiples of its factor 2, got a tensor of shape "
     "(2, 3, 3, 4). Pass what its forward returned."),
    (lambda: PixelShuffle(2)(X), ValueError,
     "PixelShuffle takes a number of channels that is a multiple of 4, the pixels of a block "
     "(2 x 2), got a tensor of shape (2, 3, 4, 4). Put InjectivePad before it."),
    (lambda: PixelUnshuffle(2).inverse(X), ValueError,
     "PixelUnshuffle's inverse takes a number of channels that is a multiple of 4, the pixels of a "
     "block (2 x 2), got a tensor of shape (2, 3, 4, 4). Pass what its forward returned."),
    # shapes
    (lambda: Reshape(48, (3, 4, 4)), TypeError,
     "Reshape takes the shape of an example as a tuple, got 48. Write (48,)."),
    (lambda: Flatten(48), TypeError, "Flatten takes the shape of an example as a tuple, got 48."),
    (lambda: Reshape((3, 4, 4), (3, 4)), ValueError,
     "Reshape takes two shapes of as many numbers, got (3, 4, 4) (48 numbers) and (3, 4) (12). "
     "Leave the batch out, and give every size; the smallest is 1."),
    (lambda: Reshape((4, -1), (-1, 4)), ValueError, "got (4, -1) (-4 numbers) and (-1, 4) (-4)."),
    (lambda: Flatten((3, 0)), ValueError, "Flatten takes two shapes of as many numbers, got (3,"),
    (lambda: Flatten((3, 4, 4))(X[0]), ValueError,
     "Flatten takes examples of shape (3, 4, 4) behind the batch, got a tensor of shape (3, 4, 4). "
     "Give it a batch dimension: x.unsqueeze(0)."),
    (lambda: Reshape((3, 4, 4), (48,))(X[..., :2]), ValueError,
     "Reshape takes examples of shape (3, 4, 4) behind the batch, got a tensor of shape "
     "(2, 3, 4, 2). Make the layer for its shape."),
    (lambda: Flatten((3, 4, 4)).inverse(X), ValueError,
     "Flatten's inverse takes examples of shape (48,) behind the batch, got a tensor of shape"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_a_mistake_is_told_with_advice(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_a_mistake_inside_parallel_layers_is_placed():
    with pytest.raises(ValueError, match="multiples of its factor 2") as caught:
        Parallel(Double(), PixelUnshuffle(2))((X, X[..., :3]))
    assert caught.value.__notes__ == ["In layer 1 (PixelUnshuffle) of Parallel."]
