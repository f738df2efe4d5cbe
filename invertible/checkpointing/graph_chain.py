"""Layers run one after the other within a compiled graph, as one differentiable operation.

A compiler has no hooks on what autograd saves. In their place stands an ``autograd.Function`` of
the whole chain, which the compiler traces layer by layer, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.decorators import graph_break
from torch.func import vjp
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from typing_extensions import override

from .._support.looking import look, stop_looking, watch
from .._support.memory_format import in_format_of
from .._support.no_trace import no_trace
from ..module import InvertibleModule
from ..state import Context, State, streams_of, tensors
from .follow import Follower
from .graph_checks import checksum, error, intact, judge, sample, size
from .plan import Branches, Step, Steps
from .replay import Replay, storing
from .samples import tolerance_for

_CANT = "invertible can't rebuild activations within a compiled graph: "
_DRAWS = f"{_CANT}a sub-network draws random numbers, or may by an operation not of torch's own."
_CHANGES = f"{_CANT}a sub-network changes its input, a buffer or a parameter in place."


def refuse(why: str) -> None:
    """Breaks the graph: an error under ``fullgraph=True``."""
    graph_break(msg=f"{_CANT}{why}.")


class _Link(NamedTuple):
    """A layer that ran in a chain, and what it takes to run it again."""

    step: Step
    shares: dict[str, int]  # the numbers of its parameters among the chain's tensors
    streams: list[tuple[torch.Size, torch.dtype]]  # shapes and dtypes of its input
    takes_tuple: bool
    compared: list[int]  # the streams of its input of which there are samples


class _Counts(NamedTuple):
    """How many tensors of each kind a run keeps."""

    ends: int  # streams behind the last layer
    stored: int  # streams in front of layers whose input is stored
    samples: int


class _Autocast(NamedTuple):
    device_type: str
    dtype: torch.dtype
    enabled: bool


class GraphChain:
    """A chain while it is traced.

    Args:
        module: The composition, for messages.
        steps: What it runs.
        context: What conditional layers take.
    """

    # What the run forward finds:
    counts: _Counts
    returns_tuple: bool
    autocast: _Autocast

    def __init__(self, module: InvertibleModule, steps: Steps, context: Context) -> None:
        self.module = module
        self.steps = steps
        self.links: list[_Link] = []
        self._leaves, self._spec = tree_flatten(context)
        self._places = [i for i, x in enumerate(self._leaves) if _takes_gradient(x)]
        # What gradients flow to besides the state: tensors of the context, then parameters.
        self.tensors: list[Tensor] = [self._leaves[i] for i in self._places]
        self.of_context = len(self.tensors)
        self.numbers: dict[Tensor, int] = {}
        for step in _flat(steps):
            for parameter in step.layer.parameters():
                if parameter.requires_grad and parameter not in self.numbers:
                    self.numbers[parameter] = len(self.tensors)
                    self.tensors.append(parameter)

    def run(self, x: State) -> tuple[Any, list[Tensor]]:
        """Runs the chain; returns the state behind it, and the log-determinants."""
        streams = streams_of(x)
        if not all(x.is_floating_point() or x.is_complex() for x in streams):
            refuse("a stream has whole numbers")
        run: Any = _Run.apply
        found = run(self, isinstance(x, tuple), len(streams), *streams, *self.tensors)
        ends, log_dets = found[: self.counts.ends], found[self.counts.ends :]
        return ends if self.returns_tuple else ends[0], list(log_dets)

    def context(self, tensors: Sequence[Tensor]) -> Context:
        """The context, with other tensors in it."""
        return tree_unflatten(self._with(tensors), self._spec)

    def require_context(self, context: Context, tensors: Sequence[Tensor]) -> None:
        """Breaks the graph if lists and dicts in a context are not what :meth:`context` made."""
        now, then = tree_leaves(context), self._with(tensors[: self.of_context])
        if len(now) != len(then) or any(x is not y for x, y in zip(now, then, strict=True)):
            refuse("a sub-network changes a list or dict in the context")

    def _with(self, tensors: Sequence[Tensor]) -> list[Any]:
        leaves = list(self._leaves)
        for place, x in zip(self._places, tensors, strict=True):
            leaves[place] = x
        return leaves


def _takes_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _flat(steps: Steps) -> list[Step]:
    found: list[Step] = []
    for step in steps:
        if isinstance(step, Branches):
            for _, inner in step.members:
                found += _flat(inner)
        else:
            found.append(step)
    return found


class _Run(torch.autograd.Function):
    """A chain as an operation on the streams of a state, tensors of a context, and parameters."""

    @staticmethod
    @override
    def forward(ctx: Any, chain: GraphChain, is_tuple: bool, count: int, *given: Tensor) -> Any:
        streams, others = [x.detach() for x in given[:count]], given[count:]
        recorder = _Recorder(chain, [x.detach() for x in others])
        look()
        # With grad, to see where any comes from: nothing that is known here requires it.
        with torch.enable_grad(), storing():
            y = recorder.follow(chain.steps, tuple(streams) if is_tuple else streams[0])
        chain.require_context(recorder.context, recorder.tensors)
        stop_looking(_DRAWS, _CHANGES)
        ends = [x.detach() for x in streams_of(y)]
        kind = ends[0].device.type
        chain.autocast = _Autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        )
        chain.returns_tuple = isinstance(y, tuple)
        chain.counts = _Counts(len(ends), len(recorder.stored), len(recorder.samples))
        ctx.chain = chain
        sums = torch.stack([checksum(x) for x in ends])
        ctx.save_for_backward(sums, *ends, *recorder.stored, *recorder.samples, *others)
        return *ends, *recorder.log_dets

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # Dynamo begins anew when a layer asks for strides, which fails within vjp: so ask at once.
        gradients[0].stride()
        sums, *saved = ctx.saved_tensors
        count = ctx.chain.counts.ends
        # Through this what is rebuilt depends on the gradients: else the compiler may compute it in
        # the forward pass, and store it.
        nothing = intact(sums, torch.stack([checksum(x) for x in saved[:count]]), gradients[0])
        ends = [x + nothing.to(x.dtype) for x in saved[:count]]
        of_ends = [in_format_of(x, g) for x, g in zip(ends, gradients, strict=False)]
        way = _WayBack(ctx.chain, ends, saved[count:], gradients[count:])
        return None, None, None, *way.back(of_ends)


class _Recorder(Follower):
    """Runs a chain, and notes what it takes to come back."""

    def __init__(self, chain: GraphChain, tensors: Sequence[Tensor]) -> None:
        context = chain.context(tensors[: chain.of_context])
        super().__init__(chain.module, context, exact=False, has_constants=False)
        self.links, self.numbers = chain.links, chain.numbers
        self.tensors = tensors
        self.stored: list[Tensor] = []
        self.samples: list[Tensor] = []

    @override
    def _record(self, step: Step, state: State) -> tuple[Any, Tensor | None]:
        layer, streams = step.layer, streams_of(state)
        self._watch(step, streams)
        shares = {
            name: self.numbers[parameter]
            for name, parameter in layer.named_parameters()
            if parameter.requires_grad
        }
        lent = {name: self.tensors[number] for name, number in shares.items()}
        with (
            _reparametrize_module(layer, lent),
            no_trace(layer, (state, self.context)) if step.untraced else nullcontext(),
        ):
            y, log_det = step.apply(state, self.context)
        results = streams_of(y)
        if any(map(_takes_gradient, (*results, log_det))):
            refuse(f"{step.place} takes a tensor that needs a gradient and is no parameter of it")
        if step.stores_input:
            # The compiler takes no views of the chain's input.
            self.stored += [x.clone() for x in streams]
        compared = _to_compare(step, streams, results)
        self.samples += [sample(streams[i]) for i in compared]
        forms = [(x.shape, x.dtype) for x in streams]
        self.links.append(_Link(step, shares, forms, isinstance(state, tuple), compared))
        return y, log_det

    def _watch(self, step: Step, streams: Sequence[Tensor]) -> None:
        """Sees to it that nothing is changed in place but statistics that nobody reads."""
        free = _statistics(step)
        context = tensors(self.context) if step.conditional else ()
        for x in (*streams, *context, *step.layer.parameters()):
            watch(x)
        for name, buffer in step.layer.named_buffers():
            if name not in free:
                watch(buffer)


def _to_compare(step: Step, streams: Sequence[Tensor], results: Sequence[Tensor]) -> list[int]:
    """Which streams of its input a layer consumes, and are to be compared with rebuilt ones."""
    settings: Any = step.rebuild
    if step.stores_input or step.moves_only or settings.tolerance == math.inf:
        return []
    return [i for i, x in enumerate(streams) if x.numel() and not any(x is y for y in results)]


def _statistics(step: Step) -> list[str]:
    """Names of the buffers that a layer writes and does not read: of BatchNorm in train mode."""
    norms = step.survey.batch_norms if step.survey else []
    return [
        f"{name}.{buffer}" if name else buffer
        for name, part in step.layer.named_modules()
        if part.training and any(part is norm for norm in norms)
        for buffer, value in part._buffers.items()
        if value is not None
    ]


class _WayBack:
    """Rebuilds the states of a chain from its end, and hands gradients on.

    Args:
        chain: What ran.
        ends: The streams behind the last layer.
        saved: What else the run saved.
        of_log_dets: The gradients of the log-determinants.
    """

    def __init__(
        self,
        chain: GraphChain,
        ends: Sequence[Tensor],
        saved: Sequence[Tensor],
        of_log_dets: Sequence[Tensor],
    ) -> None:
        _, stored, samples = chain.counts
        self.chain = chain
        self.ends = ends
        self.links = list(chain.links)
        self.stored = list(saved[:stored])
        self.samples = list(saved[stored : stored + samples])
        self.tensors = saved[stored + samples :]
        self.of_log_dets = list(of_log_dets)
        self.gradients: list[Tensor | None] = [None] * len(self.tensors)
        # Of what was compared: how far it is off, how far it may be, and where it is.
        self.errors: list[Tensor] = []
        self.tolerances: list[float] = []
        self.places: list[str] = []

    def back(self, of_ends: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of the streams at the start, and of the chain's tensors."""
        is_tuple = self.chain.returns_tuple
        y = tuple(self.ends) if is_tuple else self.ends[0]
        _, of_x = self._steps(self.chain.steps, y, tuple(of_ends) if is_tuple else of_ends[0])
        return self._judged(streams_of(of_x))

    def _steps(self, steps: Steps, y: State, of_y: State) -> tuple[State, State]:
        """The state in front of some steps, and its gradient."""
        for step in reversed(steps):
            if isinstance(step, Branches):
                y, of_y = self._branches(step, y, of_y)
            elif step.hands_through:
                y, of_y = step.undo(y, None), step.undo(of_y, None)
            else:
                y, of_y = self._link(self.links.pop(), y, of_y)
        return y, of_y

    def _branches(self, fork: Branches, y: State, of_y: State) -> tuple[State, State]:
        ys, of_ys = list(streams_of(y)), list(streams_of(of_y))
        for member, steps in reversed(fork.members):
            if isinstance(member.streams, int):
                i = member.streams
                ys[i], of_ys[i] = self._steps(steps, ys[i], of_ys[i])  # type: ignore[assignment]
                continue
            places = member.streams or ()
            x, of_x = self._steps(
                steps, tuple(ys[i] for i in places), tuple(of_ys[i] for i in places)
            )
            for i, stream, of_stream in zip(places, x, of_x, strict=True):
                ys[i], of_ys[i] = stream, of_stream
        return tuple(ys), tuple(of_ys)

    def _link(self, link: _Link, y: State, of_y: State) -> tuple[State, State]:
        """The input of a layer, and its gradient."""
        step, chain = link.step, self.chain
        stored = _pop(self.stored, len(link.streams)) if step.stores_input else []

        def again(
            lent: dict[str, Tensor], of_context: Sequence[Tensor], nudges: Sequence[Tensor]
        ) -> tuple[list[Tensor], list[Tensor]]:
            context = chain.context(of_context) if step.conditional else None
            replay = _Replay(step, context, nudges, stored)
            with _reparametrize_module(step.layer, {**lent, **_scratch(step)}):
                x = replay.run(y, link.takes_tuple)
            found, log_det = replay.result
            results = [*streams_of(found)] if log_det is None else [*streams_of(found), log_det]
            return results, [*streams_of(x)]

        lent = {name: self.tensors[number] for name, number in link.shares.items()}
        of_context = self.tensors[: chain.of_context]
        like = streams_of(y)[0]
        nudges = [like.new_zeros(shape, dtype=dtype) for shape, dtype in link.streams]
        with torch.autocast(*chain.autocast):
            made: Any = vjp(again, lent, of_context, nudges, has_aux=True)
        _, pull, streams = made
        of_results = [*streams_of(of_y)]
        if step.direction.log_det:
            of_results.append(self.of_log_dets.pop())
        of_lent, of_contexts, of_streams = pull(of_results)
        self._add(range(chain.of_context), of_contexts)
        self._add(link.shares.values(), of_lent.values())
        if link.compared:
            self._compare(link, streams, streams_of(y))
        if link.takes_tuple:
            return tuple(streams), tuple(of_streams)
        return streams[0], of_streams[0]

    def _add(self, numbers: Iterable[int], gradients: Iterable[Tensor]) -> None:
        for number, gradient in zip(numbers, gradients, strict=True):
            before = self.gradients[number]
            self.gradients[number] = gradient if before is None else before + gradient

    def _compare(self, link: _Link, found: Sequence[Tensor], y: Sequence[Tensor]) -> None:
        """Notes how far the rebuilt input of a layer is off, over the states around the layer."""
        scale = torch.stack([size(sample(x)) for x in (*found, *y) if x.numel()]).amax()
        trues = _pop(self.samples, len(link.compared))
        for i, true in zip(link.compared, trues, strict=True):
            self.errors.append(error(true, sample(found[i]), scale))
            self.tolerances.append(self._tolerance(link))
            self.places.append(link.step.place)

    def _tolerance(self, link: _Link) -> float:
        kind, narrow, enabled = self.chain.autocast
        settings: Any = link.step.rebuild
        dtypes = {dtype for _, dtype in link.streams} | ({narrow} if enabled else set())
        given: float | None = settings.tolerance
        return tolerance_for(dtypes, kind == "cpu") if given is None else given

    def _judged(self, of_x: Sequence[Tensor]) -> list[Tensor | None]:
        """All gradients, of which those of the first layer wait for the verdict."""
        if not self.errors:
            return [*of_x, *self.gradients]
        pairs = zip(self.errors, self.tolerances, strict=True)
        wrong = torch.stack([~(off <= tolerance) for off, tolerance in pairs])
        for x in self.ends:
            wrong = wrong & x.isfinite().all()
        errors = torch.stack(self.errors)
        nothing = judge(wrong, errors, self.tolerances, "\n".join(self.places))
        first = next((link.shares for link in self.chain.links if link.shares), {})
        for number in first.values():
            gradient = self.gradients[number]
            self.gradients[number] = None if gradient is None else _plus(gradient, nothing)
        return [*(_plus(x, nothing) for x in of_x), *self.gradients]


def _pop(xs: list[Tensor], count: int) -> list[Tensor]:
    """Takes some off the end of a list."""
    found = xs[len(xs) - count :]
    del xs[len(xs) - count :]
    return found


def _plus(x: Tensor, nothing: Tensor) -> Tensor:
    return x + nothing.to(x.dtype)


def _scratch(step: Step) -> dict[str, Tensor]:
    """Statistics that BatchNorm may write once more."""
    names: Collection[str] = _statistics(step)
    return {name: torch.zeros_like(b) for name, b in step.layer.named_buffers() if name in names}


class _Replay(Replay):
    """A run of a layer that is repeated in a graph, and differentiated by nudges of its input."""

    wants_result = True
    result: tuple[Any, Tensor | None]

    def __init__(
        self, step: Step, context: Context, nudges: Sequence[Tensor], stored: Sequence[Tensor]
    ) -> None:
        self.context = context
        self.again = nullcontext()
        self._step = step
        self._nudges = nudges
        self._stored = stored
        self._has_result = False

    def run(self, y: State, takes_tuple: bool) -> State:
        """Runs the layer again; returns its input."""
        layer, x = self._step.layer, self._stored
        if x and type(layer).rebuild is InvertibleModule.rebuild:
            given = self.restore_state(tuple(x) if takes_tuple else x[0])
        else:
            given = layer.rebuild(y, self)
        if not self._has_result:
            self.rerun(given)
        return given  # type: ignore[no-any-return]

    @override
    def restore(self, x: Tensor, stream: int = 0) -> Tensor:
        return (self._stored[stream] if self._stored else x.detach()) + self._nudges[stream]

    @override
    def undo(self, y: State) -> Any:
        with torch.no_grad():
            x = self._step.undo(y, self.context)
        return self.restore_state(x)

    @override
    def rerun(self, x: State) -> tuple[Any, Tensor | None]:
        self.returned(*self._step.apply(x, self.context))
        return self.result

    @override
    def returned(self, y: State, log_det: Tensor | None) -> None:
        self.result, self._has_result = (y, log_det), True
