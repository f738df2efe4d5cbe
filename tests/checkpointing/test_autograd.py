"""Autograd's features work as they do without reversible checkpointing."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from toys import (
    Counting,
    Function,
    assert_same_gradients,
    assert_same_step,
    body,
    both,
    bottleneck,
    couplings,
    evaluations,
    linear,
    pair,
    step,
)
from toys import body_images as images

from invertible import AdditiveCoupling, InvertibleSequential, Merge, Parallel, Split, Swap


def dropouts():
    return bottleneck(4, 0.3)


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
@pytest.mark.parametrize("input_needs_grad", [True, False])
def test_frozen_layers_and_inputs_get_no_gradient(frozen, input_needs_grad):
    networks = both(lambda: body(4))
    inputs = {net: images().requires_grad_(input_needs_grad) for net in networks}
    for network in networks:
        network[2 : 2 + 2 * frozen].requires_grad_(False)
    assert_same_gradients(networks, lambda net: net(inputs[net]).sin().sum())
    gradients = [x.grad for x in inputs.values()]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert (gradients[0] is not None) is input_needs_grad


def test_a_frozen_middle_is_inverted_through():
    networks = both(lambda: body(5, dropouts))
    for network in networks:
        network[4:10].requires_grad_(False)
    assert_same_gradients(networks, lambda net: net(images()).sin().sum())


@pytest.mark.parametrize("some", [slice(0, 2), slice(4, 6), slice(-2, None)])
def test_gradients_of_a_subset_are_those_of_ordinary_training(some):
    results = []
    for network in both(lambda: body(5, dropouts)):
        torch.manual_seed(2)
        y = network(images())
        results.append(torch.autograd.grad(y.sin().sum(), list(network.parameters())[some]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stream", [0, 1])
def test_one_output_stream_is_enough(stream):
    networks = both(lambda: body(3)[:-1])
    assert_same_gradients(networks, lambda net: net(images())[stream].sin().sum())


def test_gradients_of_one_branch_evaluate_that_branch_alone():
    def make():
        branches = [
            InvertibleSequential(Split(), *couplings(2, lambda: Counting(linear())), Merge())
            for _ in range(2)
        ]
        return Parallel(*branches).double()

    for branch in (0, 1):
        networks = both(make)
        assert_same_gradients(networks, lambda net: net(pair(3, 8))[branch].sin().sum())  # noqa: B023
        counted = [evaluations(layer) for layer in networks[1].layers]
        assert counted[branch] == [2, 2]
        assert counted[1 - branch] == [1, 1]


def test_a_retained_graph_can_be_used_again_and_again():
    network = body(3, dropouts, checkpoint=True)
    parameters = list(network.parameters())
    loss = network(images()).sin().sum()
    first, *others = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(3))
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


def test_layers_may_be_asked_for_in_any_order():
    torch.manual_seed(0)
    network = InvertibleSequential(*couplings(4, linear), checkpoint=True).double()
    loss = sum(part.sin().sum() for part in network(pair(3, 4)))
    layers = [list(layer.parameters()) for layer in network if isinstance(layer, AdditiveCoupling)]
    every = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    for i in (2, 0, 3, 3, 1):
        found = torch.autograd.grad(loss, layers[i], retain_graph=True)
        torch.testing.assert_close(list(found), list(every[2 * i : 2 * i + 2]))


def test_double_backward_is_that_of_ordinary_training():
    results = []
    for network in both(lambda: body(3)):
        x = images().requires_grad_()
        (gradient,) = torch.autograd.grad(network(x).sin().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        results.append([x.grad] + [p.grad for p in network.parameters()])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def test_several_forwards_before_one_backward_accumulate():
    def loss(network):
        return sum(network(images(seed=seed)).sin().sum() for seed in range(3))

    networks = both(lambda: body(3, dropouts))
    assert_same_gradients(networks, loss)
    torch.testing.assert_close(*(list(net.buffers()) for net in networks), rtol=0, atol=0)


def test_hooks_on_sub_networks_and_tensors_fire():
    stored, rebuilt = both(lambda: body(2))
    calls = {stored: [], rebuilt: []}
    for network in (stored, rebuilt):
        f = network[2].f
        log = calls[network]
        f.register_full_backward_hook(lambda *_, log=log: log.append("backward"))
        f[2].weight.register_hook(lambda _, log=log: log.append("gradient"))
        f[2].weight.register_post_accumulate_grad_hook(lambda _, log=log: log.append("accumulated"))
        # It changes the output, so that it must be applied when the layer is rebuilt as well.
        f.register_forward_hook(lambda *given: 2 * given[-1])
    assert_same_step(step(rebuilt, images()), step(stored, images()))
    assert calls[stored] == calls[rebuilt]
    assert sorted(calls[stored]) == ["accumulated", "backward", "gradient"]


def test_gradients_arrive_layer_by_layer():
    network = body(4, checkpoint=True)
    order = []
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(order.append)
    rebuilt = []
    for position, layer in enumerate(network):
        if isinstance(layer, AdditiveCoupling):
            layer.f.register_forward_hook(lambda *_, p=position: rebuilt.append((p, len(order))))
    network(images()).sum().backward()
    each = len(order) // 4
    assert rebuilt[4:] == [(8, 0), (6, each), (4, 2 * each), (2, 3 * each)]


def test_without_grad_nothing_is_recorded():
    network = body(checkpoint=True)
    with torch.no_grad():
        assert not network(images()).requires_grad
    with torch.inference_mode():
        assert network(images()).is_inference()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # in torch's own jacfwd
def test_function_transforms_get_the_plain_call_and_say_so_once():
    network = body(2).eval()
    x = images(1)
    expected = torch.autograd.functional.jacobian(network, x)
    network.checkpoint = True
    with pytest.warns(UserWarning, match="InvertibleSequential can't rebuild .* torch.func"):
        torch.testing.assert_close(torch.func.jacrev(network)(x), expected)
    torch.testing.assert_close(torch.func.jacfwd(network)(x), expected)  # warnings are errors


@pytest.mark.parametrize("transform", ["grad", "vjp", "vmap", "jvp"])
def test_a_function_transform_has_the_results_of_storing(transform):
    found = []
    for network in both(lambda: body(2).eval()):
        parameters = {name: p.detach() for name, p in network.named_parameters()}

        def loss(parameters, x, network=network):
            return functional_call(network, parameters, (x,)).sin().sum()

        with pytest.warns(UserWarning, match="func") if network.checkpoint else nullcontext():
            x = images(2)
            if transform == "grad":
                result = torch.func.grad(loss)(parameters, x)
            elif transform == "vjp":
                result = torch.func.vjp(loss, parameters, x)[1](torch.ones((), dtype=x.dtype))
            elif transform == "vmap":
                each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
                result = each(parameters, x.unsqueeze(1))
            else:
                result = torch.func.jvp(loss, (parameters, x), (parameters, x.sin()))
        found.append(result)
    torch.testing.assert_close(*found)


def test_no_transform_warns_where_nothing_is_to_be_rebuilt():
    network = body(2).eval()
    torch.func.jacrev(network)(images(1))
    network.checkpoint = True
    with torch.no_grad():
        torch.func.vmap(network)(images(2).unsqueeze(1))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_forward_mode_derivatives_are_those_of_storing():
    found = []
    for network in both(lambda: body(2).eval()):
        with (
            pytest.warns(UserWarning, match="forward-mode") if network.checkpoint else nullcontext()
        ):
            with forward_ad.dual_level():
                y = network(forward_ad.make_dual(images(), images().sin()))
                tangent = forward_ad.unpack_dual(y).tangent
                tangent.square().sum().backward()
            found.append([tangent, *(p.grad for p in network.parameters())])
            with forward_ad.dual_level():
                network(images())  # says it once
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python", "ignore:.torch.jit.trace")
def test_a_network_is_traced_as_without_checkpoint():
    network = body(2, checkpoint=True).eval()
    traced = torch.jit.trace(network, images(), check_trace=True)
    assert torch.equal(traced(images()), network(images()))


def test_a_custom_function_may_ask_again_for_what_it_saved():
    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x.exp()
            ctx.save_for_backward(x, y)
            return y

        @staticmethod
        def backward(ctx, gradient):
            for _ in range(4):
                x, y = ctx.saved_tensors
            return gradient * (y + x.exp()) / 2

    def make():
        f = Counting(nn.Sequential(*linear(), Function(Asking.apply)))
        return InvertibleSequential(AdditiveCoupling(f), Swap(), AdditiveCoupling(f)).double()

    networks = both(make)
    assert_same_gradients(networks, lambda net: sum(y.sum() for y in net(pair(3, 4))))
    # A layer is rebuilt once more when it asks for the second time, and then no more.
    assert evaluations(networks[1]) == [2 * 3]
