"""Layers that scale and shift every channel by learned numbers."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, distributed, nn
from typing_extensions import override

from .._support.checks import check_context, expect_channels
from ..module import InvertibleModule
from ..state import Context, has_values
from .mapping import expect_dim, wide


class _PerChannel(InvertibleModule):
    """Scales every channel, and shifts it before that if there is a shift."""

    shift: nn.Parameter | None

    def __init__(self, channels: int, *, dim: int = 1) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"{type(self).__name__} takes channels of at least 1, got {channels}.")
        self.channels = channels
        self.dim = expect_dim(self, dim)
        self.log_scale = nn.Parameter(torch.zeros(channels))

    @override
    def extra_repr(self) -> str:
        return f"channels={self.channels}" + (f", dim={self.dim}" if self.dim != 1 else "")

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, inverse=False)

    @override
    def inverse(self, y: Tensor) -> Tensor:
        return self._run(y, inverse=True)

    @override
    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        check_context(self, context)
        return self.forward(x), self._log_det(x)

    @override
    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        check_context(self, context)
        return self.inverse(y), -self._log_det(y)

    def _run(self, x: Tensor, inverse: bool) -> Tensor:
        x = expect_channels(self, x, self.channels, self.dim, inverse=inverse)
        values = x.to(wide(x.dtype))
        log_scale = self._broadcast(self.log_scale, values)
        if inverse:
            values = values * (-log_scale).exp()
        if self.shift is not None:
            shift = self._broadcast(self.shift, values)
            values = values - shift if inverse else values + shift
        if not inverse:
            values = values * log_scale.exp()
        return values.to(x.dtype)

    def _log_det(self, x: Tensor) -> Tensor:
        places = x.shape[1:].numel() // self.channels
        return (places * self.log_scale.to(wide(x.dtype)).sum()).expand(x.shape[0])

    def _broadcast(self, numbers: Tensor, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.dim] = self.channels
        return numbers.to(x.dtype).view(shape)


class Scale(_PerChannel):
    r"""Scales every channel by a learned number.

    .. math:: y_{n, c, *} = e^{s_c}\, x_{n, c, *}

    :math:`s` is learned, 0 at the beginning: the last layer of NICE.

    Args:
        channels: :math:`C`, at least 1.
        dim: The dimension of the channels, not 0; -1 for tokens.

    Shape:
        - Input: :math:`(N, C, *)`.
        - Output: :math:`(N, C, *)`.

    Raises:
        TypeError: When called on anything but a tensor of floating-point numbers.
        ValueError: If ``channels`` is less than 1 or ``dim`` is 0; when called on another number of
            channels.

    References:
        Dinh et al., *NICE* (2014), section 3.3, https://arxiv.org/abs/1410.8516.

    Example:
        >>> layer = Scale(2)
        >>> nn.init.constant_(layer.log_scale, 1.0)  # doctest: +ELLIPSIS
        Parameter containing:...
        >>> layer.forward_and_log_det(torch.ones(1, 2))[1]
        tensor([2.], grad_fn=<ExpandBackward0>)
    """

    def __init__(self, channels: int, *, dim: int = 1) -> None:
        super().__init__(channels, dim=dim)
        self.shift = None


class ActNorm(_PerChannel):
    r"""Shifts and scales every channel, at first so that it has mean 0 and deviation 1.

    .. math:: y_{n, c, *} = e^{s_c} (x_{n, c, *} + b_c)

    The first batch decides where :math:`s` and :math:`b` begin; from then on they are learned as
    any parameters. That batch is the first that ``forward`` is given in train mode, or the one
    given to :meth:`initialise`. Before, the layer can't be run in another way. Whether it has
    happened stands in the buffer ``initialised``, and so in the ``state_dict``. A channel that is
    constant in that batch is shifted to 0 and not scaled.

    Where ``torch.distributed`` runs, all processes take part in the first batch, and begin alike.
    Under ``fully_shard`` a process can't write parameters: initialise the layer before.

    Args:
        channels: :math:`C`, at least 1.
        dim: The dimension of the channels, not 0; -1 for tokens.
        initialised: Whether the layer begins as the identity and needs no batch, as in a network
            that is trained through its ``inverse``.

    Shape:
        - Input: :math:`(N, C, *)`.
        - Output: :math:`(N, C, *)`.

    Raises:
        TypeError: When called on anything but a tensor of floating-point numbers.
        ValueError: If ``channels`` is less than 1 or ``dim`` is 0; when called on another number
            of channels; if the first batch has a single value a channel, or values that are not
            finite.
        RuntimeError: When called in eval mode or inverted before the first batch; if that comes
            after ``fully_shard``.

    References:
        Kingma and Dhariwal, *Glow* (2018), section 3.1, https://arxiv.org/abs/1807.03039.

    Example:
        >>> layer = ActNorm(3)
        >>> y = layer(5 + 2 * torch.randn(100, 3, 8, 8))
        >>> torch.testing.assert_close(y.mean(), torch.tensor(0.0), atol=1e-3, rtol=0)
        >>> torch.testing.assert_close(y.std(), torch.tensor(1.0), atol=1e-3, rtol=0)
    """

    initialised: Tensor

    def __init__(self, channels: int, *, dim: int = 1, initialised: bool = False) -> None:
        super().__init__(channels, dim=dim)
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialised", torch.tensor(initialised))
        # Read from the buffer once: each look at it would wait for the device.
        self._is_initialised = initialised

    def initialise(self, x: Tensor) -> None:
        """Lets a batch decide where the parameters begin; also a second time.

        Args:
            x: What the layer would be given, :math:`(N, C, *)`.
        """
        x = expect_channels(self, x, self.channels, self.dim)
        if getattr(self, "_is_fsdp_managed_module", False):
            raise RuntimeError(
                "ActNorm can't begin from a batch under fully_shard, where no process has the "
                "whole parameters. Run a batch through it before, or load a state_dict, or make it "
                "with initialised=True."
            )
        shift, log_scale = self._from_batch(x.detach())
        # Behind autograd's back: reversible checkpointing refuses parameters that change between a
        # run and its backward pass, and rebuilds with these.
        assert self.shift is not None
        self.shift.data.copy_(shift)
        self.log_scale.data.copy_(log_scale)
        self.initialised.fill_(True)
        self._is_initialised = True

    @override
    def forward(self, x: Tensor) -> Tensor:
        if not self._is_initialised and has_values(x):
            if not self.training:
                self._refuse("it was called in eval mode")
            begin: Any = self.initialise
            if torch.compiler.is_dynamo_compiling():
                begin = torch.compiler.disable(begin)  # type: ignore[no-untyped-call]
            begin(x)
        return self._run(x, inverse=False)

    @override
    def inverse(self, y: Tensor) -> Tensor:
        if not self._is_initialised and has_values(y):
            self._refuse("its inverse was called")
        return self._run(y, inverse=True)

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"ActNorm begins with the statistics of a first batch, and {what} before there was "
            "one. Run a batch through forward in train mode, call initialise(x), load a "
            "state_dict, or make it with initialised=True."
        )

    def _from_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and logarithm of the scale that give a batch mean 0 and deviation 1."""
        values = x.to(wide(x.dtype)).movedim(self.dim, 0).flatten(1)
        count = _over_processes(values.new_tensor(values.shape[1]))
        mean = _over_processes(values.sum(1)) / count
        std = (_over_processes((values - mean[:, None]).square().sum(1)) / count).sqrt()
        if count < 2:
            raise ValueError(
                "ActNorm can't tell a deviation from a single value a channel (input shape "
                f"{tuple(x.shape)}). Begin with a larger batch, or make it with initialised=True."
            )
        if not std.isfinite().all():
            raise ValueError(
                "ActNorm can't begin with a batch that has values which are not finite, or too "
                "large for their variance."
            )
        # What is left of the deviation of equal numbers is rounding.
        constant = std <= 16 * torch.finfo(std.dtype).eps * mean.abs()
        return -mean, -std.where(~constant, 1.0).log()

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Written to a copy where forward ran within an inverse, which leaves no trace in buffers.
        self.initialised.fill_(self._is_initialised)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @override
    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        if not self.initialised.is_meta:
            self._is_initialised = bool(self.initialised)


def _over_processes(x: Tensor) -> Tensor:
    """The sum over all processes, where there are several."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(x)
    return x
