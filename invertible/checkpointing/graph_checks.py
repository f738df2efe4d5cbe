"""What was rebuilt within a compiled graph, compared by value with what there was."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, library

from .samples import COUNT
from .settings import RebuildError


def sample(x: Tensor) -> Tensor:
    """Values of a tensor at places that are spread pseudo-randomly, in float32 or wider."""
    # By a hash, since sizes may be symbols.
    places = torch.arange(COUNT, device=x.device) * 2654435761 % x.numel()
    found = x.detach().take(places)
    if found.is_complex():
        found = torch.cat((found.real, found.imag))
    return found if found.dtype in (torch.float32, torch.float64) else found.float()


def size(sample: Tensor) -> Tensor:
    """The root mean square."""
    return sample.square().mean().sqrt()


def error(true: Tensor, found: Tensor, scale: Tensor) -> Tensor:
    """How far a sample is off relative to a size, but for its largest number: see samples.py."""
    squares = (found - true).square()
    off = ((squares.sum() - squares.amax()).clamp_min(0) / len(squares)).sqrt()
    # Where the run was not finite, nothing can be rebuilt, and nothing is lost.
    return torch.where((off == 0) | ~true.isfinite().all(), 0.0, off / scale)


def checksum(x: Tensor) -> Tensor:
    """A number that changes with any bit of a tensor, but the sign of zeros."""
    if x.is_complex():
        x = torch.cat((x.real, x.imag))
    if x.dtype == torch.float64:
        return (x + 0.0).view(torch.int64).sum()
    return (x.float() + 0.0).view(torch.int32).sum()


@library.custom_op("invertible::intact", mutates_args=())
def intact(before: Tensor, now: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG001
    """Zero if checksums are the same; raises otherwise, or is NaN on an accelerator."""
    wrong = (before != now).any()
    if not wrong.is_cpu:  # which is not made to wait
        return torch.where(wrong, math.nan, 0.0)
    if wrong:
        raise RuntimeError(
            "the output of a composition with reversible checkpointing was changed in place "
            "between forward and backward, so that its activations can't be rebuilt. Use an "
            "out-of-place operation behind it, for instance ReLU(inplace=False)."
        )
    return torch.zeros(())


@library.custom_op("invertible::judge", mutates_args=())
def judge(wrong: Tensor, errors: Tensor, tolerances: Sequence[float], places: str) -> Tensor:
    """Zero if nothing is wrong; raises otherwise, or is NaN on an accelerator."""
    if not wrong.is_cpu:
        return torch.where(wrong.any(), math.nan, 0.0)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise RebuildError(
            f"{places.splitlines()[i]} was not rebuilt as it ran: its input is off by "
            f"{float(errors[i]):.2g} of its norm, with a tolerance of {tolerances[i]:g}. The "
            "gradients of this backward pass are wrong: do not use them. Without torch.compile, "
            "measure_drift() and Rebuild(debug=True) show where it comes from."
        )
    return torch.zeros(())


def _made(like: Tensor, *_: object) -> Tensor:
    """What both return, for the compiler."""
    return like.new_empty((), dtype=torch.float32)


intact.register_fake(_made)
judge.register_fake(_made)
