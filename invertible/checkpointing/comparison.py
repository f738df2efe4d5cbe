"""What was rebuilt, compared by value with what was there in the forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from .._support.compiling import may_compile, uncompiled
from .plan import Step
from .samples import checksum, distances, sample, sizes, tolerance_for
from .settings import RebuildError

if TYPE_CHECKING:
    from .frame import Frame

# How many activations of a layer are compared: two, since the last may be zeros behind a layer of
# zeros, which hide what went wrong before it.
WATCHED = 2
# How far behind an activation the parameter may be that it met: BatchNorm's statistics lie between.
NEAR = 3

INPUT, OUTPUT, LOG_DET = "its input", "what it returned", "its log-determinant"
# Masks that are computed of an activation change in some places when it does in its last bits.
MASK_TOLERANCE = 0.3
ACTIVATION, MASK = "an activation in it", "what autograd saved last in it"


class Comparison:
    """Samples of a run's tensors, as they were and as they were rebuilt, and the verdict on them.

    A backward pass collects, and the verdict comes at its end, so that nothing waits for an
    accelerator before. Compared are

    - states: each tensor that a layer consumed, and what a layer returned that runs again;
    - activations: the last ones in a layer that met a parameter, which autograd saved together.
      Behind a small last layer, such as residual branches start with, the state hardly shows what
      went wrong before it.

    Args:
        exact: Whether states must come back in every bit.
    """

    def __init__(self, exact: bool) -> None:
        self._exact = exact
        self._true: dict[int, Tensor] = {}  # by the number of a tensor in the chain
        self._sums: dict[int, Tensor] = {}
        self._dtypes: set[torch.dtype] = set()
        self._pairs: list[_Pair] = []
        self._exact_pairs: list[tuple[Step, Tensor, Tensor]] = []
        self._end: list[Tensor] = []
        self._task = -1  # the backward pass at whose end the verdict is due

    def remember(
        self,
        frame: Frame,
        streams: Sequence[Tensor],
        y: Any,
        log_det: Tensor | None,
        saved: Sequence[Tensor],
    ) -> None:
        """Takes samples of a layer that has just run; ``saved`` is what autograd saved in it."""
        if frame.tolerance == math.inf:
            return
        frame.watched = _watch(saved)
        self._dtypes.update([x.dtype for _, _, x in frame.watched], [x.dtype for x in streams])
        if log_det is not None:
            frame.log_det = sample(log_det)
        if frame.step.stores_input:
            self.see(frame.outputs, y if isinstance(y, tuple) else (y,))
            return
        for number, stream in zip(frame.inputs, streams, strict=True):
            if number in frame.outputs or number in self._true:
                continue
            self.see([number], [stream])
            if self._exact and (total := checksum(stream)) is not None:
                self._sums[number] = total

    def see(self, numbers: Sequence[int], streams: Sequence[Tensor]) -> None:
        """Takes samples of tensors of which there are none yet."""
        for number, stream in zip(numbers, streams, strict=True):
            if number not in self._true and (found := sample(stream)) is not None:
                self._true[number] = found

    def begin(self, end: Sequence[Tensor]) -> None:
        """Called for each layer that is rebuilt; ``end`` is the state behind the last layer."""
        task = torch._C._current_graph_task_id()
        if task == self._task != -1:
            return
        self._task = task
        self._pairs, self._exact_pairs = [], []  # of a backward pass that failed, if any
        self._end = [x.detach().sum(dtype=_summed(x.dtype)) for x in end]
        if task != -1:
            # A compiled training step would compile it.
            judge = partial(uncompiled(Comparison.judge), self) if may_compile() else self.judge
            Variable._execution_engine.queue_callback(judge)

    def finish(self) -> None:
        """Called when a layer is rebuilt: outside of a backward pass no end is to wait for."""
        if self._task == -1:
            self.judge()

    def returned(self, frame: Frame, y: Any, log_det: Tensor | None) -> None:
        """What a layer returned that ran again."""
        for number, stream in zip(frame.outputs, y if isinstance(y, tuple) else (y,), strict=True):
            if number not in frame.inputs and number in self._true:
                self._add(frame, OUTPUT, self._true[number], sample(stream))
        if log_det is not None and frame.log_det is not None:
            self._add(frame, LOG_DET, frame.log_det, sample(log_det))

    def saved(self, frame: Frame, found: Sequence[Tensor]) -> None:
        """What autograd saved in a layer that ran again."""
        for place, what, true in frame.watched:
            self._add(frame, what, true, sample(found[place]))

    def arrived(self, frame: Frame, streams: Sequence[Tensor]) -> None:
        """The rebuilt input of a layer."""
        for number, stream in zip(frame.inputs, streams, strict=True):
            if number in frame.outputs or frame.step.stores_input or number not in self._true:
                continue
            self._add(frame, INPUT, self._true[number], sample(stream))
            if number in self._sums and (total := checksum(stream)) is not None:
                self._exact_pairs.append((frame.step, self._sums[number], total))

    def _add(self, frame: Frame, what: str, true: Tensor, found: Tensor | None) -> None:
        if found is not None and true.dtype == found.dtype:
            around = (*frame.inputs, *frame.outputs)
            self._pairs.append(_Pair(frame.step, what, frame.tolerance, around, true, found))

    def judge(self) -> None:
        """Raises if what was rebuilt in this backward pass is not what there was."""
        pairs, exact_pairs = self._pairs, self._exact_pairs
        self._pairs, self._exact_pairs, self._task = [], [], -1
        if not pairs or _is_capturing(pairs[0].true):
            return
        error = _first_bits(exact_pairs) or self._worst(pairs)
        # Where the run itself was not finite, as with a gradient scaler's steps that are skipped,
        # nothing can be rebuilt, and nothing is lost.
        if error is not None and all(x.isfinite() for x in self._end):
            raise RebuildError(
                f"{error} The gradients of this backward pass are wrong: do not use them."
            )

    def _worst(self, pairs: list[_Pair]) -> str | None:
        """What to say of the first layer that was rebuilt wrongly."""
        distance = distances([p.true for p in pairs], [p.found for p in pairs]).tolist()
        own = sizes([p.true for p in pairs]).tolist()
        states = dict(zip(self._true, sizes([*self._true.values()]).tolist(), strict=True))
        default = tolerance_for(self._dtypes, pairs[0].true.is_cpu)
        before = 0.0
        for pair, off, size in zip(pairs, distance, own, strict=True):
            tolerance = default if pair.tolerance is None else pair.tolerance
            if pair.what == MASK:
                tolerance = max(tolerance, MASK_TOLERANCE)
            around = max((states[number] for number in pair.around if number in states), default=0)
            scale = pair.scale(size, around, tolerance)
            if not math.isfinite(scale) or off <= tolerance * scale:
                if off and scale:
                    before = max(before, off / scale)
                continue
            return pair.describe(off / scale if scale else math.inf, tolerance, before)
        return None


class _Pair(NamedTuple):
    """A sample of something as it was and as it was rebuilt."""

    step: Step
    what: str
    tolerance: float | None
    around: tuple[int, ...]  # numbers of the tensors before and behind the layer
    true: Tensor
    found: Tensor

    def scale(self, size: float, around: float, tolerance: float) -> float:
        """What an error is relative to, given the sizes of what is compared and of the state.

        A state is compared with the larger of the states before and behind the layer, never with
        one stream alone, which may be zero.
        """
        if self.what in (ACTIVATION, MASK):
            # Of a sparse one all samples may be zeros but those that rounding lifted above a kink.
            return max(size, min(1, 10 * tolerance) * around)
        if self.what == LOG_DET:
            return max(size, 1)
        return around

    def describe(self, error: float, tolerance: float, before: float) -> str:
        where = (
            f"{self.step.place} was not rebuilt as it ran: {self.what} is off by {error:.2g} of "
            f"its norm, with a tolerance of {tolerance:g}."
        )
        if before > tolerance / 100:
            return (
                f"{where} Layers behind it were off by up to {before:.2g}, so rounding errors grow "
                "from layer to layer: measure_drift() shows where. A float64 state, "
                "Rebuild(anchor_every=...) or exact mode (a quantum) helps."
            )
        return (
            f"{where} Layers behind it were right, so it depends on something that changed between "
            "the passes: random numbers of NumPy, of Python or of a generator of its own, another "
            "thread that draws, a counter or another attribute, a parameter's .data; or its "
            "inverse is none. Rebuild(debug=True) names the operation."
        )


def _first_bits(pairs: list[tuple[Step, Tensor, Tensor]]) -> str | None:
    if not pairs:
        return None
    steps, true, found = zip(*pairs, strict=True)
    wrong = [a != b for a, b in zip(_read(true), _read(found), strict=True)]
    if not any(wrong):
        return None
    return (
        f"{steps[wrong.index(True)].place} was not rebuilt bit for bit, in exact mode: its input "
        "differs. Either the range in which sums are exact was left inside the network "
        "(check_layers=True finds the layer), or its sub-network did not compute the same "
        "when it ran again (Rebuild(debug=True) names the operation)."
    )


def _read(sums: Sequence[Tensor]) -> list[int]:
    return torch.stack([x.to(sums[0].device) for x in sums]).tolist()


def _watch(saved: Sequence[Tensor]) -> list[tuple[int, str, Tensor]]:
    """Samples of activations among the tensors that autograd saved, their places and kind."""
    chosen = [(place, ACTIVATION) for place in _activations(saved)[:WATCHED]]
    # Behind the last parameter there may be dropout, whose mask needs no grad.
    behind = range(len(saved) - 1, max([place for place, _ in chosen], default=-1), -1)
    masks = (place for place in behind if _is_mask(saved[place]))
    chosen += [(place, MASK) for place in islice(masks, 1)]
    found = [(place, what, sample(saved[place])) for place, what in chosen]
    return [(place, what, x) for place, what, x in found if x is not None]


def _is_mask(x: Tensor) -> bool:
    """Whether a tensor may be a mask, in contrast to buffers, indices and statistics of a batch."""
    return (
        not x.requires_grad
        and x.dim() > 1
        and (x.is_floating_point() or x.dtype is torch.bool)
        and not isinstance(x, nn.Parameter)
    )


def _activations(saved: Sequence[Tensor]) -> list[int]:
    """Places of activations: those saved just before a parameter, then others, last first.

    Where none needs grad, as in a first layer, they can't be told from buffers but by their shape.
    """
    beside, others, parameter = [], [], len(saved) + NEAR
    for place in range(len(saved) - 1, -1, -1):
        x = saved[place]
        if isinstance(x, nn.Parameter) or (x.requires_grad and _is_of_parameter(x)):
            parameter = place
        elif x.requires_grad and parameter - place <= NEAR:
            beside.append(place)
            parameter = len(saved) + NEAR
            if len(beside) == WATCHED:
                return beside
        elif x.requires_grad:
            others.append(place)
    if not (beside or others):
        return [i for i, x in enumerate(saved) if x.is_floating_point() and x.dim() > 1][::-1]
    return beside + others


def _is_of_parameter(x: Tensor) -> bool:
    """Whether a tensor is a parameter turned or cast, or another leaf."""
    node = x.grad_fn
    while node is not None and type(node).__name__ in _MOVES:
        node = node.next_functions[0][0]
    return node is None or isinstance(getattr(node, "variable", None), nn.Parameter)


_MOVES = {
    f"{name}Backward0" for name in ("T", "ToCopy", "Transpose", "Permute", "View", "UnsafeView")
}


def _summed(dtype: torch.dtype) -> torch.dtype:
    """A dtype in which a sum is finite if its terms are."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be read."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
