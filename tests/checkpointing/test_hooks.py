"""What a call of a layer does besides its forward: hooks, wrappers, compiled code."""

import threading

import pytest
import torch
from torch.nn.modules import module as torch_module
from toys import (
    AddsContext,
    Affine,
    AffineCoupling,
    Chained,
    Counting,
    TwiceEvaluated,
    assert_same_step,
    both,
    evaluations,
    images,
    linear,
    memory_of,
    pair,
    step,
)

from invertible import (
    AdditiveCoupling,
    Inverse,
    InvertibleSequential,
    Merge,
    OnStreams,
    Parallel,
    Rebuild,
    ReversibleBlock,
    Split,
    Swap,
    reversible_checkpoint,
)


def network():
    inner = InvertibleSequential(AffineCoupling(linear(out=4)), Swap())
    return InvertibleSequential(
        Split(),
        AdditiveCoupling(linear()),
        Swap(),
        TwiceEvaluated(linear(out=4)),
        Parallel(Affine(0.3, 0.1), Chained(Affine(0.2, 0.4))),
        OnStreams(1, Inverse(Affine(0.1, 0.7))),
        inner,
        ReversibleBlock(linear(), linear()),
        Merge(),
    ).double()


LAYERS = ["0", "1", "2", "3", "4", "4.0", "4.1", "4.1.parts.0", "5.layer", "6", "6.0", "6.1", "7"]
LAYERS += ["7.f", "8"]


def changed(state):
    if isinstance(state, tuple):
        return (state[0] * 1.5 + 1, *state[1:])
    return state * 1.5 + 1


HOOKS = {
    "a forward hook": lambda m: m.register_forward_hook(lambda _m, _x, y: changed(y)),
    "a pre-hook": lambda m: m.register_forward_pre_hook(lambda _m, x: (changed(x[0]),)),
    "a backward hook": lambda m: m.register_full_backward_hook(
        lambda _m, gx, _gy: None if gx[0] is None else tuple(2 * g for g in gx)
    ),
    "a backward pre-hook": lambda m: m.register_full_backward_pre_hook(
        lambda _m, gy: tuple(None if g is None else 2 * g for g in gy)
    ),
    "a hook that draws": lambda m: m.register_forward_hook(
        lambda _m, _x, y: (
            (y[0] * torch.rand_like(y[0]), *y[1:])
            if isinstance(y, tuple)
            else y * torch.rand_like(y)
        )
    ),
    "a hook that looks on": lambda m: m.register_forward_hook(lambda *_: None),
    "a hook on tensors": lambda m: m.register_forward_hook(
        lambda _m, _x, y: (
            (y[0] if isinstance(y, tuple) else y).register_hook(lambda g: 3 * g) and None
        )
    ),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:For backward hooks")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("place", LAYERS)
def test_hooks_of_a_layer_have_the_gradients_of_storing(place, hook):
    stored, rebuilt = both(network)
    for net in (stored, rebuilt):
        HOOKS[hook](net.get_submodule(place))
    for _ in range(2):
        assert_same_step(step(rebuilt, images(5, 4)), step(stored, images(5, 4)))
    if hook.startswith("a backward") or hook == "a hook on tensors":
        return
    with torch.no_grad():
        torch.manual_seed(0)
        expected = stored(images(5, 4))
        torch.manual_seed(0)
        assert torch.equal(rebuilt(images(5, 4)), expected)


@pytest.mark.parametrize("hook", ["a forward hook", "a pre-hook", "a hook that draws"])
@pytest.mark.parametrize("place", ["1", "2", "3", "6.0"])
@pytest.mark.parametrize("when", ["removed", "added"])
def test_hooks_of_the_forward_pass_are_those_that_count(place, hook, when):
    found = []
    for net in both(network):
        if when == "removed":
            handle = HOOKS[hook](net.get_submodule(place))
        torch.manual_seed(0)
        y = net(images(5, 4))
        if when == "removed":
            handle.remove()
        else:
            HOOKS[hook](net.get_submodule(place))
        y.sin().sum().backward()
        found.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def flow():
    return InvertibleSequential(
        Split(),
        AdditiveCoupling(linear()),
        Swap(),
        AffineCoupling(linear(out=4)),
        Swap(),
        Parallel(Affine(0.3, 0.1), Affine(0.2, 0.4)),
    ).double()


@pytest.mark.parametrize("hook", ["a forward hook", "a pre-hook", "a hook that draws"])
@pytest.mark.parametrize("place", ["1", "2", "3", "5.0"])
@pytest.mark.parametrize("method", ["forward_and_log_det", "inverse", "inverse_and_log_det"])
def test_hooks_have_the_gradients_of_storing_in_the_other_ways_to_run(place, hook, method):
    found = []
    for net in both(flow):
        HOOKS[hook](net.get_submodule(place))
        torch.manual_seed(0)
        x = images(5, 4) if method.startswith("forward") else pair(5, 4)
        result = getattr(net, method)(x)
        y, log_det = result if method.endswith("log_det") else (result, torch.zeros(()))
        y = y if isinstance(y, torch.Tensor) else y[0] * y[1]
        (y.sin().sum() + log_det.sum()).backward()
        found.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_hook_with_parameters_is_trained():
    found = []
    for net in both(network):
        adapter = linear().double()
        adapter.load_state_dict(net[1].f.state_dict())
        net[1].register_forward_hook(lambda _m, _x, y, f=adapter: (y[0] + f(y[0]), y[1]))
        net(images(5, 4)).sin().sum().backward()
        found.append([p.grad for p in (*net.parameters(), *adapter.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_global_hooks_have_the_gradients_of_storing():
    def hook(module, _, y):
        return (y[0] + 1, y[1]) if isinstance(module, AdditiveCoupling | Swap) else None

    stored, rebuilt = both(network)
    handle = torch_module.register_module_forward_hook(hook)
    try:
        assert_same_step(step(rebuilt, images(5, 4)), step(stored, images(5, 4)))
    finally:
        handle.remove()
    assert_same_step(step(rebuilt, images(5, 4)), step(stored, images(5, 4)))


def test_a_pre_hook_may_change_the_context():
    def make():
        couplings = [AdditiveCoupling(AddsContext(2), conditional=True) for _ in range(2)]
        return InvertibleSequential(Split(), couplings[0], Swap(), couplings[1], Merge()).double()

    stored, rebuilt = both(make)
    context = torch.rand(2, dtype=torch.float64)
    for net in (stored, rebuilt):
        net[1].register_forward_pre_hook(lambda _m, inputs: (inputs[0], 2 * inputs[1]))
    assert_same_step(step(rebuilt, images(), context), step(stored, images(), context))


def test_a_pre_hook_that_returns_a_bare_pair_fails_as_without_checkpoint():
    """Torch takes it for two arguments."""
    for checkpoint in (False, True):
        net = InvertibleSequential(AdditiveCoupling(linear()), checkpoint=checkpoint).double()
        net[0].register_forward_pre_hook(lambda _m, x: x[0])
        with pytest.raises(TypeError, match="takes a pair"):
            net(pair(5, 4))


def test_hooks_of_a_layer_fire_once():
    fired = []
    _, net = both(network)
    for place in ("1", "2", "3", "4.0", "8"):
        net.get_submodule(place).register_forward_hook(lambda *_: fired.append(1))
    net(images(5, 4)).sum().backward()
    assert len(fired) == 5


def test_hooks_that_look_on_cost_no_memory_and_no_evaluation():
    held = []
    for depth in (2, 8):
        layers = [AdditiveCoupling(Counting(linear(32))) for _ in range(depth)]
        net = InvertibleSequential(*layers, checkpoint=True)
        for layer in net:
            layer.register_forward_hook(lambda *_: None)
        x = pair(256, 64, dtype=torch.float32)
        forward = memory_of(lambda net=net, x=x: net(x))
        held.append(forward.held)
        (forward.result[0] * forward.result[1]).sum().backward()
        assert evaluations(net) == depth * [2]
    assert held[1] - held[0] < 256 * 32  # a quarter of a stream, for samples


def test_a_single_layer_with_a_hook_is_right():
    found = []
    for run in (lambda layer, x: layer(x), reversible_checkpoint):
        torch.manual_seed(0)
        layer = AdditiveCoupling(linear()).double()
        layer.register_forward_hook(lambda _m, _x, y: changed(y))
        y1, y2 = run(layer, tuple(x.requires_grad_() for x in pair(5, 4)))
        (y1 * y2).sum().backward()
        found.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_anchors_and_hooks_go_together():
    stored, rebuilt = both(network)
    rebuilt.checkpoint = Rebuild(anchor_every=2)
    for net in (stored, rebuilt):
        for place in ("1", "2", "3", "6.0"):
            HOOKS["a forward hook"](net.get_submodule(place))
    assert_same_step(step(rebuilt, images(5, 4)), step(stored, images(5, 4)))


@pytest.mark.parametrize("place", ["1", "2", "3"])
def test_a_hook_that_changes_a_state_in_place_is_refused(place):
    def after(_m, _x, y):
        y[0].add_(1)

    def before(_, x):
        x[0][0].add_(1)

    for name, hook in (("forward_hook", after), ("forward_pre_hook", before)):
        _, net = both(network)
        getattr(net.get_submodule(place), f"register_{name}")(hook)
        with pytest.raises(RuntimeError, match=rf"a hook of layer {place} .* in place"):
            net(images(5, 4))
        assert "forward" not in net.get_submodule(place).__dict__


def test_other_threads_run_the_layer_itself_meanwhile():
    _, net = both(network)
    layer, found = net[1], []

    def hook(*_):
        if not found:
            found.append(None)
            with torch.no_grad():
                other = threading.Thread(
                    target=lambda: found.append(type(layer).__call__(layer, pair(5, 4)))
                )
                other.start()
                other.join()

    layer.register_forward_hook(hook)
    net(images(5, 4)).sum().backward()
    assert torch.equal(found[1][1], pair(5, 4)[1])


# --- methods that somebody replaced


def wrapped(layer, name="forward"):
    method = getattr(layer, name)
    setattr(layer, name, lambda x: changed(method(x)))


@pytest.mark.parametrize("place", ["0", "1", "2", "3", "4.0", "6", "6.0", "7", "8"])
@pytest.mark.parametrize("when", ["stays", "taken back"])
def test_a_wrapped_forward_has_the_gradients_of_storing(place, when):
    found = []
    for net in both(network):
        layer = net.get_submodule(place)
        wrapped(layer)
        y = net(images(5, 4))
        if when == "taken back":
            del layer.forward
        y.sin().sum().backward()
        found.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("place", ["1", "2", "3", "5.0"])
@pytest.mark.parametrize("method", ["inverse", "forward_and_log_det"])
def test_a_wrapped_forward_is_no_part_of_the_other_methods(place, method):
    found = []
    for net in both(flow):
        wrapped(net.get_submodule(place))
        if method == "inverse":
            y = net.inverse(pair(5, 4))
        else:
            (y1, y2), log_det = net.forward_and_log_det(images(5, 4))
            y = y1 * y2 + log_det.unsqueeze(1)
        y.sin().sum().backward()
        found.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_wrapped_inverse_has_the_gradients_of_storing():
    for loss in (lambda net: net(images(5, 4)), lambda net: net.inverse(pair(5, 4))):
        found = []
        for net in both(flow):
            for place in ("1", "2", "3"):
                wrapped(net.get_submodule(place), "inverse")
            y = loss(net)
            (y[0] * y[1] if isinstance(y, tuple) else y).sin().sum().backward()
            found.append([p.grad for p in net.parameters()])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_forward_that_is_wrapped_anew_is_seen():
    _, net = both(network)
    outputs = []
    for factor in (2, 3):
        net[1].forward = lambda x, factor=factor: (factor * x[0], x[1])
        outputs.append(net[:2](images(5, 4))[0])
        whole = net(images(5, 4))
        outputs.append(whole)
    torch.testing.assert_close(outputs[2], 1.5 * outputs[0])
    assert not torch.allclose(outputs[1], outputs[3])
