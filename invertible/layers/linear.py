"""Invertible linear layers over the channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._support.checks import check_context, expect_channels
from .._support.memory_format import in_format_of, is_channels_last
from ..module import InvertibleModule
from ..state import Context
from .mapping import expect_dim, wide

Parametrization = Literal["plu", "orthogonal"]


class InvertibleLinear(InvertibleModule):
    r"""Multiplies the channels by a learned matrix that stays invertible: a 1x1 convolution.

    .. math:: y_{n, :, *} = W x_{n, :, *}, \qquad
        \log |\det \partial y / \partial x| = S \log |\det W|

    with :math:`S` places :math:`*`. The parametrizations of :math:`W`:

    ``"plu"``
        :math:`W = P L (U + \operatorname{diag}(d))`, with a fixed permutation, a lower triangle
        with ones on the diagonal and a strict upper one, and
        :math:`d_c = \pm \exp(7 \tanh r_c)`, which keeps its sign and stays within 0.0009 and
        1100. The determinant is the product of the diagonal.
    ``"orthogonal"``
        a product of :math:`C` Householder reflections, orthogonal for any parameters. It preserves
        volume, and its inverse is the transpose.

    Both begin as random rotations (or reflections), drawn from torch's generator. The
    matrix and its inverse are made anew in each run, and applied in float32 or wider, also under
    autocast.

    Args:
        channels: :math:`C`, at least 1.
        parametrization: Of the matrix.
        dim: The dimension of the channels, not 0; -1 for tokens.

    Shape:
        - Input: :math:`(N, C, *)`, with any number of spatial dimensions.
        - Output: :math:`(N, C, *)`.

    Raises:
        TypeError: When called on anything but a tensor of floating-point numbers.
        ValueError: If ``channels`` is less than 1, ``dim`` is 0 or there is no such
            parametrization; when called on another number of channels.

    References:
        Kingma and Dhariwal, *Glow* (2018), section 3.2, https://arxiv.org/abs/1807.03039; Tomczak
        and Welling, *Improving Variational Auto-Encoders using Householder Flow* (2016), section 3,
        https://arxiv.org/abs/1611.09630.

    Example:
        >>> layer = InvertibleLinear(3)
        >>> x = torch.randn(2, 3, 8, 8)
        >>> y, log_det = layer.forward_and_log_det(x)
        >>> torch.testing.assert_close(layer.inverse(y), x, rtol=1e-3, atol=1e-3)
        >>> torch.testing.assert_close(log_det / 64, layer.matrix().slogdet()[1].expand(2))
    """

    permutation: Tensor
    sign: Tensor

    def __init__(
        self, channels: int, parametrization: Parametrization = "plu", *, dim: int = 1
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"InvertibleLinear takes channels of at least 1, got {channels}.")
        names = get_args(Parametrization)
        if parametrization not in names:
            raise ValueError(
                f"InvertibleLinear takes a parametrization of {names}, got {parametrization!r}."
            )
        self.channels = channels
        self.parametrization = parametrization
        self.dim = expect_dim(self, dim)
        # In float64, which some accelerators lack.
        drawn = torch.randn(channels, channels, dtype=torch.float64, device="cpu")
        reflections, _ = torch.geqrf(drawn)
        kind: Any = {"dtype": torch.get_default_dtype(), "device": torch.get_default_device()}
        if parametrization == "orthogonal":
            self.vectors = nn.Parameter(reflections.tril(-1).to(**kind))
            return
        rotation = _product(reflections.tril(-1))
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation.argmax(1).to(kind["device"]))
        self.register_buffer("sign", diagonal.sign().to(**kind))
        self.lower = nn.Parameter(lower.tril(-1).to(**kind))
        self.upper = nn.Parameter(upper.triu(1).to(**kind))
        reach = (diagonal.abs().log() / _REACH).clamp(-0.99, 0.99)
        self.raw_diagonal = nn.Parameter(reach.atanh().to(**kind))

    @property
    @override
    def volume_preserving(self) -> bool:
        return self.parametrization == "orthogonal"

    @override
    def extra_repr(self) -> str:
        where = f", dim={self.dim}" if self.dim != 1 else ""
        return f"channels={self.channels}, parametrization={self.parametrization!r}{where}"

    def matrix(self) -> Tensor:
        """:math:`W`, in the dtype of the parameters, float32 at least."""
        if self.parametrization == "orthogonal":
            return _product(self._wide(self.vectors))
        lower, upper = self._triangles()
        product = _out_of_autocast(lambda: torch.addmm(upper, lower, upper), upper)
        return product[self.permutation]

    def inverse_matrix(self) -> Tensor:
        """:math:`W^{-1}`."""
        if self.parametrization == "orthogonal":
            return self.matrix().T
        lower, upper = self._triangles()
        one = torch.eye(self.channels, dtype=lower.dtype, device=lower.device)
        rows: Tensor = torch.linalg.solve_triangular(lower, one, upper=False, unitriangular=True)
        rows = torch.linalg.solve_triangular(upper, rows, upper=True)
        return rows[:, self.permutation]

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = expect_channels(self, x, self.channels, self.dim)
        return self._multiply(self.matrix, x)

    @override
    def inverse(self, y: Tensor) -> Tensor:
        y = expect_channels(self, y, self.channels, self.dim, inverse=True)
        return self._multiply(self.inverse_matrix, y)

    @override
    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        check_context(self, context)
        return self.forward(x), self._log_det(x)

    @override
    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        check_context(self, context)
        return self.inverse(y), -self._log_det(y)

    def _multiply(self, matrix: Callable[[], Tensor], x: Tensor) -> Tensor:
        return _out_of_autocast(lambda: _over_channels(matrix(), x, self.dim), x)

    def _log_det(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        if self.parametrization == "orthogonal":
            return x.new_zeros(x.shape[0], dtype=dtype)
        places = x.shape[1:].numel() // self.channels
        return (places * self._log_diagonal().to(dtype).sum()).expand(x.shape[0])

    def _log_diagonal(self) -> Tensor:
        return _REACH * self._wide(self.raw_diagonal).tanh()

    def _triangles(self) -> tuple[Tensor, Tensor]:
        """The lower one without its ones, and the upper one with its diagonal."""
        diagonal = self._wide(self.sign) * self._log_diagonal().exp()
        upper = self._wide(self.upper).triu(1).diagonal_scatter(diagonal)
        return self._wide(self.lower).tril(-1), upper

    def _wide(self, parameter: Tensor) -> Tensor:
        return parameter.to(wide(parameter.dtype))


# The largest logarithm of a number on the diagonal.
_REACH = 7.0


def _out_of_autocast(run: Callable[[], Tensor], x: Tensor) -> Tensor:
    """What a function returns where autocast, for the device of a tensor, is off."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return run()
    return run()


def _product(vectors: Tensor) -> Tensor:
    """The product of the reflections at the columns of a lower triangle, ones on its diagonal."""
    vectors = vectors.tril(-1)
    factors = 2 / (1 + vectors.square().sum(0))
    product: Tensor = torch.linalg.householder_product(vectors, factors)
    return product


def _over_channels(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    values = x.to(wide(x.dtype))
    matrix = matrix.to(values.dtype)
    if x.dim() > 2 and dim % x.dim() == 1 and not is_channels_last(x):
        # Half the time of torch.matmul, or of a convolution.
        y = torch.bmm(matrix.expand(len(x), -1, -1), values.flatten(2)).view(x.shape)
    else:
        y = torch.matmul(values.movedim(dim, -1), matrix.T).movedim(-1, dim)
    return in_format_of(x, y.to(x.dtype))
