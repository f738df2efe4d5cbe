"""
Your own layer
==============

A layer is a class with two methods, ``forward`` and ``inverse``. You will write
one, let ``inversecheck`` tell whether it is right, see what it says of wrong
ones, and go on to layers with a sub-network, with a context, and to one that is
rebuilt in a single evaluation.
"""

# %%
# A whole layer
# -------------
#
# An affine layer scales and shifts every channel by learned numbers:
#
# .. math:: y_{n, c, *} = e^{s_c} x_{n, c, *} + t_c
#
# The scale is kept as its logarithm, so that no training step can make it zero
# and the layer singular. The Jacobian is diagonal, with :math:`e^{s_c}` once for
# every place :math:`*` of channel :math:`c`. So its log-determinant is
# :math:`\sum_c s_c` times the number of places, for every example.

import torch
from torch import Tensor, nn

from invertible import InvertibleModule, InvertibleSequential, Permute


class Affine(InvertibleModule):
    """Scales and shifts every channel.

    Args:
        channels: How many channels the input has.

    Shape:
        - Input: ``(N, C, *)``.
        - Output: ``(N, C, *)``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self._for(x)
        return scale * x + shift

    def inverse(self, y: Tensor) -> Tensor:
        scale, shift = self._for(y)
        return (y - shift) / scale

    def forward_and_log_det(self, x):
        return self(x), self._log_det(x)

    def inverse_and_log_det(self, y):
        return self.inverse(y), -self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        places = x[0, 0].numel()
        return (places * self.log_scale.sum()).expand(x.shape[0])

    def _for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift, shaped so that they broadcast over ``x``."""
        channels = len(self.shift)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"Affine takes a tensor, got a {type(x).__name__}. "
                "Put Merge() before it to join the streams."
            )
        if x.dim() < 2 or x.shape[1] != channels:
            raise ValueError(
                f"Affine takes {channels} channels as the second dimension, "
                f"got shape {tuple(x.shape)}."
            )
        shape = (1, channels) + (1,) * (x.dim() - 2)
        return self.log_scale.exp().view(shape), self.shift.view(shape)


# %%
# ``forward`` and ``inverse`` are all that a layer needs. The other two return the
# log-determinant, of shape ``(N,)``, beside the output, as normalizing flows need
# it; leave them out, and they raise :exc:`NotImplementedError`. The input is
# checked at once, before a broadcast can turn a mistake into a wrong result.
#
# A layer of your own is used as any other. In a composition, log-determinants add
# up:

network = InvertibleSequential(Affine(3), Permute([2, 0, 1]), Affine(3))
y, log_det = network.forward_and_log_det(torch.randn(2, 3, 4, 4))
print(log_det.shape)

# %%
# and an error says at which layer it happened:

try:
    network(torch.randn(2, 5, 4, 4))
except ValueError as error:
    print(error, *error.__notes__, sep="\n")

# %%
# Check it
# --------
#
# :func:`~invertible.testing.inversecheck` checks all laws of :doc:`the contract
# </api/contract>` at one input. Take random parameters, since zeros hide
# mistakes, and float64, where rounding is small. For small inputs it also
# compares the log-determinant with the Jacobian that autograd gives.

from invertible.testing import InversecheckError, inversecheck

torch.manual_seed(0)
layer = Affine(3).double()
for parameter in layer.parameters():
    nn.init.normal_(parameter)

x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
print(inversecheck(layer, x))

# %%
# Where a law is broken, it says which, where, and by how much:


class Wrong(InvertibleModule):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + 1

    def inverse(self, y: Tensor) -> Tensor:
        return y / 2 - 1


try:
    inversecheck(Wrong(), x)
except InversecheckError as error:
    print(error)

# %%
# In a test suite, let `Hypothesis <https://hypothesis.readthedocs.io>`_ draw the
# inputs:

from hypothesis import given, settings

from invertible.testing import strategies


@settings(max_examples=20, deadline=None)
@given(strategies.tensors())
def test_affine_keeps_the_laws(x):
    inversecheck(Affine(x.shape[1]).double(), x)


test_affine_keeps_the_laws()

# %%
# A layer with a sub-network
# --------------------------
#
# An affine coupling scales and shifts one stream by functions of the other,
#
# .. math:: y_1 = x_1 \, e^{s(x_2)} + t(x_2), \qquad y_2 = x_2
#
# (which the library has, but let us write it) and its inverse evaluates the
# sub-network as well. That must not move
# BatchNorm's running statistics a second time, nor draw from the generators that
# dropout uses. :class:`~invertible.no_trace` sees to it:

from invertible import no_trace


class AffineCoupling(InvertibleModule):
    """Scales and shifts one stream of a pair by functions of the other.

    Args:
        f: Returns, for the second stream, twice the channels of the first.
    """

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x1, x2 = x
        log_scale, shift = self.f(x2).chunk(2, dim=1)
        return x1 * log_scale.exp() + shift, x2

    def inverse(self, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y1, x2 = y
        with no_trace(self.f, y):
            log_scale, shift = self.f(x2).chunk(2, dim=1)
        return (y1 - shift) * (-log_scale).exp(), x2


f = nn.Sequential(
    nn.Conv2d(2, 8, kernel_size=3, padding=1),
    nn.BatchNorm2d(8),
    nn.Tanh(),
    nn.Conv2d(8, 4, kernel_size=1),
).double()
pair = tuple(torch.randn(2, 4, 2, 6, 6, dtype=torch.float64))
print(inversecheck(AffineCoupling(f), pair))

# %%
# (Checks of the input and log-determinants are left out, to keep to the point.)
# Without ``no_trace``:


class Traced(AffineCoupling):
    def inverse(self, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y1, x2 = y
        log_scale, shift = self.f(x2).chunk(2, dim=1)
        return (y1 - shift) * (-log_scale).exp(), x2


try:
    inversecheck(Traced(f), pair)
except InversecheckError as error:
    print(error)

# %%
# A layer needs ``no_trace`` only if its ``inverse`` runs modules that have
# buffers or draw random numbers, or modules that come from the caller, which may.
# ``Affine`` runs none. Nor does a layer that only calls the ``inverse`` of other
# layers: these see to it themselves. (Such a layer need not be written by hand: it
# is :doc:`a composition, which lists them </howto/own_composition>`.)
#
# A layer with a context
# ----------------------
#
# A layer that depends on more than the state, such as on a class label, sets
# ``conditional`` and takes it as the second argument of every method. This one
# also preserves volume, and so has log-determinants of zero for nothing:


class ClassShift(InvertibleModule):
    """Shifts every channel by a learned number for each class.

    The context is the classes of the examples, ``(N,)``.
    """

    conditional = True
    volume_preserving = True

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.shift = nn.Embedding(classes, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + self._shift(x, context)

    def inverse(self, y: Tensor, context: Tensor) -> Tensor:
        return y - self._shift(y, context)

    def _shift(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.shift(labels).view(x.shape[:2] + (1,) * (x.dim() - 2))


labels = torch.tensor([3, 7])
print(inversecheck(ClassShift(10, 3).double(), x, labels))

# %%
# A composition takes the context in the same place, and hands it to those layers
# that take one:

network = InvertibleSequential(
    Affine(3), ClassShift(10, 3), Permute([2, 0, 1])
).double()
y = network(x, labels)
torch.testing.assert_close(network.inverse(y, labels), x)

# %%
# If several layers need different things, let the context be a dict or a
# dataclass of which each takes its part.
#
# Rebuild with one evaluation
# ---------------------------
#
# Every layer takes part in training :doc:`without storing activations
# </explanation/memory>`. By default it is inverted in the backward pass, and then
# run once more: the sub-network is evaluated twice. A coupling can do with once,
# since the parameters that take :math:`y_1` back to :math:`x_1` are those whose
# gradient is wanted. :class:`~invertible.Coupling` does so, for any map of single
# values, which is then all that you write. It has log-determinants too, and calls
# ``no_trace`` itself:

from invertible import Coupling, ElementwiseMap


class ScaleAndShift(ElementwiseMap):
    parameters_per_value = 2

    def forward_and_log_det(self, x, parameters):
        log_scale, shift = parameters
        return x * log_scale.exp() + shift, log_scale

    def inverse_and_log_det(self, y, parameters):
        log_scale, shift = parameters
        return (y - shift) * (-log_scale).exp(), -log_scale


# %%
# A layer that is no coupling overrides ``rebuild``, as :doc:`/howto/own_layer_once`
# shows.
#
# See that it pays, by counting the evaluations in a training step, and that the
# gradients are those of ordinary training:


def step(layer, checkpoint):
    """The gradients of a training step, and the evaluations of f that it took."""
    calls = []
    with layer.f.register_forward_hook(lambda *_: calls.append(1)):
        y1, y2 = InvertibleSequential(layer, checkpoint=checkpoint)(pair)
        gradients = torch.autograd.grad((y1 * y2).sum(), list(layer.parameters()))
    return gradients, len(calls)


expected, plain = step(AffineCoupling(f), checkpoint=False)
_, by_default = step(AffineCoupling(f), checkpoint=True)
found, at_once = step(Coupling(f, ScaleAndShift()), checkpoint=True)
torch.testing.assert_close(found, expected)

# %%

import matplotlib.pyplot as plt

ways = {
    "activations stored": plain,
    "inverted and run again, the default": by_default,
    "rebuilt at once": at_once,
}
figure, axes = plt.subplots(figsize=(7, 2), layout="constrained")
bars = axes.barh(list(ways), list(ways.values()), color="tab:blue")
axes.bar_label(bars, padding=4)
axes.invert_yaxis()
axes.set_title("evaluations of the sub-network in a training step", fontsize=10)
axes.set_xticks([])
axes.spines[:].set_visible(False)

# %%
# And the laws hold as before. One of them is that rebuilding gives the gradients
# of stored activations, in both directions:

print(inversecheck(Coupling(f, ScaleAndShift()), pair))

# %%
# The laws with all their fine print are in :doc:`the contract </api/contract>`,
# the methods and properties of a layer in :doc:`the reference </api/base>`.
