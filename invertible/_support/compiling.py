"""What ``torch.compile`` needs to be told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn


def calling(module: nn.Module) -> Callable[..., Any]:
    """A function that calls a module.

    ``module.compile()`` does nothing, in silence, for modules whose forward is torch's own, such as
    ``nn.Sequential`` (torch 2.13): the compiler skips torch's files, but not this one.
    """

    def call_module(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    return call_module


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module may run compiled code."""
    return (
        module._compiled_call_impl is not None
        or "_orig_mod" in module._modules  # torch.compile(module)
        or "forward" in module.__dict__  # module.forward = torch.compile(module.forward)
    )


def may_compile() -> bool:
    """Whether anything may be compiled in this process: looking costs less than to be prepared."""
    compiler = sys.modules.get("torch._dynamo")
    # Another thread may be importing it, which takes a second.
    return compiler is not None and not getattr(compiler.__spec__, "_initializing", False)


@cache
def keep_out(*functions: Callable[..., Any]) -> None:
    """Lets functions run as they are where code around them is compiled, but not what they call."""
    from torch._dynamo.decorators import skip  # takes a second to import

    for function in functions:
        skip(function)


@cache
def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, out of the compiler's reach."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return,no-untyped-call]


def can_raise() -> bool:
    """Whether an error can be raised on what a state is found to hold."""
    return not (
        torch.compiler.is_compiling()  # also by torch.export
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    )
