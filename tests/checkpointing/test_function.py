"""``reversible_checkpoint`` takes what a call of the module takes."""

import copy

import pytest
import torch
from torch import nn
from toys import (
    AddsContext,
    Affine,
    AffineCoupling,
    Double,
    Keep,
    body,
    body_images,
    bottleneck,
    couplings,
    images,
    linear,
    memory_of,
    pair,
)

from invertible import (
    AdditiveCoupling,
    InjectivePad,
    Inverse,
    InvertibleSequential,
    Merge,
    PixelUnshuffle,
    Rebuild,
    Split,
    Swap,
    measure_drift,
    reversible_checkpoint,
)


def conditional():
    return InvertibleSequential(
        Split(), AdditiveCoupling(AddsContext(2), conditional=True), Swap(), Merge()
    )


def nested():
    inner = InvertibleSequential(Split(), AffineCoupling(nn.Conv2d(2, 4, 1)), Swap(), Merge())
    return InvertibleSequential(Affine(), Inverse(inner), inner)


CONTEXT = torch.tensor([1.0, 2.0], dtype=torch.float64)
CALLS = {
    "a layer": (Affine, ()),
    "a layer inverted": (lambda: Inverse(Affine()), ()),
    "a composition": (nested, ()),
    "a composition inverted": (lambda: Inverse(nested()), ()),
    "turned twice": (lambda: Inverse(Inverse(nested())), ()),
    "with a context": (conditional, (CONTEXT,)),
    "inverted with a context": (lambda: Inverse(conditional()), (CONTEXT,)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("log_det", [False, True])
def test_it_returns_what_the_call_returns_and_has_its_gradients(name, log_det):
    make, context = CALLS[name]
    torch.manual_seed(0)
    network = make().double()
    ways = [
        network.forward_and_log_det if log_det else network,
        lambda *given: reversible_checkpoint(network, *given, log_det=log_det),
    ]
    results = []
    for call in ways:
        network.zero_grad()
        x = (0.3 * images() + 0.5).requires_grad_()
        y = call(x, *context)
        sum(part.sin().sum() for part in (y if log_det else [y])).backward()
        gradients = [x.grad, *(p.grad for p in network.parameters())]
        results.append([y, gradients])
    (expected, gradients), (found, found_gradients) = results
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(found_gradients, gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inverted", [False, True])
def test_activations_are_not_stored(inverted):
    module = InvertibleSequential(*couplings(8, linear))
    module = Inverse(module) if inverted else module
    x = pair(5000, 4, dtype=torch.float32)
    stored = memory_of(lambda: module(x))
    rebuilt = memory_of(lambda: reversible_checkpoint(module, x))
    assert rebuilt.held < stored.held / 5


def test_the_network_itself_stays_as_it_is():
    network = body()
    reversible_checkpoint(network, body_images())
    assert network.checkpoint is False


def injective():
    return InvertibleSequential(InjectivePad(1), Keep())


@pytest.mark.parametrize("log_det", [False, True])
@pytest.mark.parametrize(
    ("make", "given"),
    [
        (body, ("nonsense",)),
        (body, (pair(),)),
        (body, (images(2, 2, 3, 3),)),
        (body, ([images()],)),
        (body, (body_images(), CONTEXT)),
        (lambda: Inverse(body()), (images(1, 3, 2, 2),)),
        (lambda: Inverse(Inverse(body())), (images(1, 3, 3, 3),)),
        (lambda: Inverse(body()), (body_images(), CONTEXT)),
        (Swap, (images(),)),
        (lambda: Inverse(Swap()), (images(),)),
        (conditional, (images(),)),
        (lambda: Inverse(conditional()), (images(),)),
        (lambda: conditional()[1], (pair(),)),
        (InvertibleSequential, (images(),)),
        (lambda: InvertibleSequential(PixelUnshuffle(2), InvertibleSequential()), (images(),)),
        (lambda: Inverse(injective()), (images(),)),
        (lambda: InvertibleSequential(Keep(), Inverse(injective())), (images(),)),
    ],
)
def test_what_a_call_refuses_it_refuses_with_the_same_error(make, given, log_det):
    def call(network):
        return (network.forward_and_log_det if log_det else network)(*given)

    def refusal(run):
        with pytest.raises((TypeError, ValueError)) as caught:
            run(make())
        return caught.type, str(caught.value), getattr(caught.value, "__notes__", [])

    found = refusal(lambda network: reversible_checkpoint(network, *given, log_det=log_det))
    assert found == refusal(call)


def test_a_missing_log_determinant_is_told():
    for module in (Double(), Inverse(Double()), InvertibleSequential(Keep(), Double())):
        with pytest.raises(NotImplementedError, match="Double defines no log-determinant"):
            reversible_checkpoint(module, images(), log_det=True)


def test_what_is_no_layer_is_refused():
    with pytest.raises(TypeError, match=r"InvertibleModule, got a Conv2d"):
        reversible_checkpoint(nn.Conv2d(2, 2, 1), images())


@pytest.mark.parametrize("anchor_every", [None, 2])
def test_the_hooks_of_the_module_fire(anchor_every):
    network = body(4, lambda: bottleneck(4, 0.3))
    calls = []

    def double(_, __, y):
        calls.append("hook")
        return 2 * y

    network.register_forward_hook(double)
    gradients = []
    for call in (
        copy.deepcopy(network),
        lambda x: reversible_checkpoint(network, x, rebuild=Rebuild(anchor_every=anchor_every)),
    ):
        torch.manual_seed(1)
        x = body_images().requires_grad_()
        with measure_drift() as drift:
            call(x).sin().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert calls == ["hook"] * 2
    assert (drift.worst.error == 0) == (anchor_every == 2)  # every coupling starts afresh


def test_without_grad_it_is_the_plain_call():
    network = body()
    with torch.inference_mode():
        assert reversible_checkpoint(network, body_images()).is_inference()
    with torch.no_grad():
        assert not reversible_checkpoint(network, body_images()).requires_grad
