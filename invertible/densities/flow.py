"""The density of data that an invertible layer maps to latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution
from typing_extensions import override

from .._support.checks import describe, is_state
from ..layers.masked import Masked
from ..module import InvertibleModule
from ..state import Context, State, map_streams, streams_of
from .base import Base, StandardNormal, bases_of
from .contexts import count_examples, for_examples, repeated
from .distribution import FlowDistribution
from .shapes import Shapes, describe_shapes, shapes_of, shapes_through


class Flow(nn.Module):
    r"""The density of data that an invertible layer maps to latents of a known density.

    .. math:: \log p(x) = \log p_Z(f(x)) + \log |\det \partial f(x) / \partial x|

    The layer's ``forward`` leads from data to latents, its ``inverse`` from samples of the base to
    samples of the data. Called, ``flow()`` or ``flow(context)``, it is a
    :class:`torch.distributions.Distribution`, a :class:`~invertible.FlowDistribution`; and the flow
    itself can be the base of another.

    A context may be any object. Each tensor in it, also within tuples, lists and dicts, has an
    entry for each of :math:`B` examples along its first dimension, if it has dimensions. For the
    densities of :math:`N` examples :math:`B` must be :math:`N`, or 1 for all of them. Samples are
    drawn for each of the :math:`B`.

    Args:
        layer: Any layer with log-determinants. Where it has ``checkpoint=True``, training is flat
            in memory, through :meth:`log_prob` and through :meth:`rsample_and_log_prob`.
        base: The distribution of one example's latents: one of torch, whose tensors move with the
            flow and are not learned; or a module whose call returns one, learned, and given the
            context if its ``forward`` takes an argument, then with :math:`N` first in its
            ``batch_shape``; or a sequence of these, one for each stream of the latents. By default
            standard normals. Dimensions that it does not count as its event are summed over.
        event_shape: The shape of one example of data, or a sequence of those of its streams. To
            be given for samples from standard normals; otherwise it is found from the base.

    Raises:
        TypeError: If an argument is of another kind; when called, if a context is missing or
            superfluous.
        ValueError: If a layer has no log-determinant, or a base is made of tensors that require
            grad; when called, if shapes don't fit, or the context is for another number of
            examples.

    References:
        Rezende and Mohamed, *Variational Inference with Normalizing Flows* (2015), section 3,
        https://arxiv.org/abs/1505.05770; Papamakarios et al., *Normalizing Flows for Probabilistic
        Modeling and Inference* (2021), section 2, https://arxiv.org/abs/1912.02762.

    Example:
        >>> coupling = AffineCoupling(nn.Linear(1, 2))
        >>> flow = Flow(InvertibleSequential(Split(), coupling, Merge()), event_shape=(2,))
        >>> x, log_prob = flow.rsample_and_log_prob((5,))
        >>> torch.testing.assert_close(flow.log_prob(x), log_prob)
        >>> flow().sample((3, 4)).shape
        torch.Size([3, 4, 2])
    """

    def __init__(
        self,
        layer: InvertibleModule,
        base: Distribution | nn.Module | Sequence[Distribution | nn.Module] | None = None,
        *,
        event_shape: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.layer = _expect_densities(layer)
        self._is_standard = base is None
        if self._is_standard and any(isinstance(part, Masked) for part in layer.modules()):
            raise ValueError(
                "Flow takes a base of its own with Masked in the layer: standard normals would "
                "count the padding as latents. See the guide on padded sequences."
            )
        self.bases = nn.ModuleList(
            [StandardNormal(_like(layer))] if base is None else bases_of(base)
        )
        self._event_shapes = None if event_shape is None else shapes_of(event_shape)
        self._latent_shapes: Shapes | None = None

    @property
    def conditional(self) -> bool:
        """Whether the layer or the base takes a context."""
        return self.layer.conditional or any(base.conditional for base in self._bases)

    @property
    def requires_context(self) -> bool:
        """Whether it can't do without."""
        return self.layer.requires_context or any(base.requires_context for base in self._bases)

    @property
    def event_shape(self) -> Size:
        """The shape of one example of data.

        Raises:
            TypeError: If data have several streams, which no tensor holds.
            ValueError: If it was not given, and can't be found from the base.
        """
        if self._event_shapes is None:
            self._event_shapes = self._find_event_shapes()
        if len(self._event_shapes) > 1:
            raise TypeError(
                f"this Flow's data have {len(self._event_shapes)} streams, and a distribution is "
                "of one tensor: put Split in front, or call log_prob and sample of the flow itself."
            )
        return self._event_shapes[0]

    @override
    def forward(self, context: Context = None) -> FlowDistribution:
        """The distribution of data, given a context if the flow is conditional."""
        self._check_context(context)
        return FlowDistribution(self, context)

    def log_prob(self, x: State, context: Context = None) -> Tensor:
        """The logarithm of the density of each example; with :class:`Dequantize`, a lower bound.

        Shape:
            - Input: :math:`(N, *)`, the event behind the batch.
            - Output: :math:`(N,)`.
        """
        self._check_context(context)
        context = for_examples(context, len(streams_of(self._expect_data(x))[0]))
        z, log_det = self._run(self.layer.forward_and_log_det, x, context)
        log_prob: Tensor = self._log_prob_of_latents(z, context) + log_det
        return log_prob

    def bits_per_dim(self, x: State, context: Context = None) -> Tensor:
        r"""How many bits the density takes to code each number of an example, on average.

        .. math:: -\frac{1}{D} \log_2 p(x)

        It means something for whole numbers, such as pixels, with :class:`Dequantize` in the layer.
        Numbers that were scaled outside of it add the logarithm of that scale, 8 for pixels over
        256.

        Shape:
            - Input: :math:`(N, *)`, with :math:`D` numbers an example.
            - Output: :math:`(N,)`.
        """
        streams = streams_of(self._expect_data(x))
        dimensions = sum(stream.shape[1:].numel() for stream in streams)
        return -self.log_prob(x, context) / (dimensions * math.log(2))

    @torch.no_grad()
    def sample(
        self, shape: Sequence[int] = (), context: Context = None, *, temperature: float = 1.0
    ) -> Any:
        """Draws examples of data, by torch's generators.

        Args:
            shape: How many, for each example of the context.
            context: What they are conditioned on, :math:`B` examples.
            temperature: What the deviation of the base is multiplied by, at least 0 and finite;
                other than 1 for normal distributions only.

        Shape:
            - Output: ``(*shape, *event)``, or ``(*shape, B, *event)`` given a context of examples.

        Raises:
            TypeError: If the base is not normal, and the temperature not 1.
            ValueError: If the temperature is negative or not finite, or ``event_shape`` is needed.
        """
        if not 0 <= temperature < math.inf:
            raise ValueError(f"Flow takes a finite temperature, at least 0, got {temperature}.")
        batch, context = self._for_samples(shape, context)
        z = self._draw(batch.numel(), context, temperature)
        return self._as_drawn(self._run(self.layer.inverse, z, context), batch)

    def rsample_and_log_prob(
        self, shape: Sequence[int] = (), context: Context = None
    ) -> tuple[Any, Tensor]:
        """Draws examples through which gradients flow, with the logarithms of their densities.

        One pass through the layer gives both. To train where a density is known and no data are, by
        the reverse Kullback-Leibler divergence for instance.

        Shape:
            - Output: as of :meth:`sample`; and the same without the event.

        Raises:
            NotImplementedError: If the base can't be sampled with gradients; if a layer adds a
                likelihood term, as :class:`Dequantize` does: a sample's density is not known then.
            ValueError: If ``event_shape`` is needed.
        """
        batch, context = self._for_samples(shape, context)
        z = self._draw(batch.numel(), context, None)
        x, log_det = self._run(self.layer.inverse_and_log_det, z, context)
        log_prob = self._log_prob_of_latents(z, context) - log_det
        return self._as_drawn(x, batch), log_prob.reshape(batch)

    def has_rsample(self, context: Context = None) -> bool:
        """Whether the base can be sampled with gradients, and no layer adds a likelihood term."""
        return self.layer.bijective and all(
            base.distribution(Size(), context if base.conditional else None).has_rsample
            for base in self._bases
        )

    @property
    def _bases(self) -> list[Base]:
        return list(self.bases)  # type: ignore[arg-type]

    def _check_context(self, context: Context) -> None:
        if context is None and self.requires_context:
            raise TypeError(
                "this Flow is conditional and got no context: call it as flow(context), "
                "log_prob(x, context), sample(shape, context)."
            )
        if context is not None and not self.conditional:
            raise TypeError(
                f"this Flow got a context ({describe(context)}), and neither its layer nor its "
                "base takes one."
            )

    def _expect_data(self, x: Any) -> Any:
        if not is_state(x):
            raise TypeError(f"Flow takes data as a tensor or a tuple of such, got {describe(x)}.")
        shapes = tuple(stream.shape[1:] for stream in streams_of(x))
        if self._event_shapes is not None and shapes != self._event_shapes:
            expected = " and ".join(f"(N, {str(tuple(shape))[1:]}" for shape in self._event_shapes)
            raise ValueError(
                f"Flow takes data of its event_shape behind a batch, {expected}, got {describe(x)}."
            )
        return x

    def _run(self, method: Callable[..., Any], state: Any, context: Context) -> Any:
        return method(state, context) if self.layer.conditional else method(state)

    def _log_prob_of_latents(self, z: State, context: Context) -> Tensor:
        streams, bases = streams_of(z), self._bases
        if self._is_standard:
            bases *= len(streams)
        elif len(streams) != len(bases):
            raise ValueError(
                f"Flow's layer made latents of {len(streams)} streams, and its base is for "
                f"{len(bases)}: hand over one distribution for each, or put Merge behind."
            )
        found = [base.log_prob(part, context) for base, part in zip(bases, streams, strict=True)]
        return torch.stack(found).sum(0)

    def _for_samples(self, shape: Sequence[int], context: Context) -> tuple[Size, Context]:
        """The shape of what is drawn, without the event, and a context for all of it in a row."""
        self._check_context(context)
        if not isinstance(shape, Sequence):
            raise TypeError(
                f"Flow takes the shape of samples as a tuple, ({shape},), got {shape!r}."
            )
        own = count_examples(context)
        batch = Size(shape) if own is None else Size([*shape, own])
        return batch, repeated(context, Size(shape).numel())

    def _draw(self, count: int, context: Context, temperature: float | None) -> Any:
        bases, shapes = self._bases, (Size(),) * len(self.bases)
        if self._is_standard:
            shapes = self._find_latent_shapes(context, count)
            bases *= len(shapes)
        z = tuple(
            base.draw(count, shape, context if base.conditional else None, temperature)
            for base, shape in zip(bases, shapes, strict=True)
        )
        return z if len(z) > 1 else z[0]

    def _as_drawn(self, x: State, batch: Size) -> State:
        shapes = tuple(stream.shape[1:] for stream in streams_of(x))
        if self._event_shapes is not None and shapes != self._event_shapes:
            raise ValueError(
                f"Flow's layer made examples of shape {describe_shapes(shapes)} of its latents, "
                f"and its event_shape is {describe_shapes(self._event_shapes)}."
            )
        return map_streams(lambda stream: stream.reshape(*batch, *stream.shape[1:]), x)

    def _find_latent_shapes(self, context: Context, count: int) -> Shapes:
        if self._event_shapes is None:
            raise ValueError(
                "Flow draws samples from standard normals if it knows the shape of data: "
                "Flow(layer, event_shape=(3, 32, 32)), for instance."
            )
        if self._latent_shapes is None:
            shapes = shapes_through(self.layer, self._event_shapes, context, count)
            if shapes is None:
                raise ValueError(
                    "Flow can't find the shape of its latents, which depends on values: give a "
                    "base, a distribution for each stream of them."
                )
            self._latent_shapes = shapes
        return self._latent_shapes

    def _find_event_shapes(self) -> Shapes:
        shapes = tuple(base.shape() for base in self._bases)
        found = None
        if not self._is_standard and None not in shapes and not self.layer.requires_context:
            known: Any = shapes
            found = shapes_through(self.layer, known, None, 1, inverse=True)
        if found is None:
            raise ValueError(
                "Flow is called for a distribution if it knows the shape of data: Flow(layer, "
                "event_shape=(3, 32, 32)), for instance."
            )
        return found


def _expect_densities(layer: Any) -> InvertibleModule:
    if not isinstance(layer, InvertibleModule):
        raise TypeError(f"Flow takes a layer of this library, got {describe(layer)}.")
    for part in _leaves(layer):
        computes = type(part).forward_and_log_det is not InvertibleModule.forward_and_log_det
        if not (part.injective and (part.volume_preserving or computes)):
            raise ValueError(
                f"Flow takes layers with densities, and {type(part).__name__} "
                + ("has no log-determinant." if part.injective else "is not injective.")
            )
    return layer


def _leaves(layer: InvertibleModule) -> list[InvertibleModule]:
    members = layer.members()
    if members is None:
        return [layer]
    return [leaf for member in members for leaf in _leaves(member.layer)]


def _like(layer: InvertibleModule) -> Tensor:
    """A tensor of the layer's dtype and device."""
    return next((x for x in layer.parameters() if x.is_floating_point()), torch.empty(0))
