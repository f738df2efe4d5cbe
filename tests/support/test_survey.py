"""A survey finds all that a layer consists of, and what it may do."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from toys import Function, batch_norm_net, bottleneck, couplings

from invertible import AdditiveCoupling, InvertibleSequential, ReversibleBlock
from invertible._support.survey import _NEVER_DRAW, survey


class Own(nn.Module):
    """A class that nobody knows."""

    def forward(self, x):
        return x


def test_modules_and_parameters_are_listed_once_as_torch_lists_them():
    shared = nn.Linear(2, 2)
    tied = nn.Linear(2, 2)
    tied.weight = shared.weight
    layer = nn.ModuleDict({"a": nn.Sequential(shared, shared), "b": tied, "c": nn.ReLU()})
    layer.missing = None
    layer.register_parameter("none", None)
    found = survey(layer)
    assert len(found.modules) == len(list(layer.modules()))
    assert {*map(id, found.modules)} == {*map(id, layer.modules())}
    assert len(found.parameters) == len(list(layer.parameters()))
    assert {*map(id, found.parameters)} == {*map(id, layer.parameters())}


def test_modules_with_buffers_are_found_wherever_they_are():
    f = batch_norm_net()
    found = survey(AdditiveCoupling(nn.Sequential(f, nn.Identity())))
    assert found.with_buffers == [f[0]]
    plain = nn.Identity()
    plain.register_buffer("table", torch.ones(2))
    assert survey(nn.Sequential(plain)).with_buffers == [plain]
    # It may register some when it runs.
    own = Own()
    assert survey(nn.Sequential(own, nn.ReLU())).with_buffers == [own]


def test_batch_statistics_are_told_from_buffers_that_results_depend_on():
    own = Own()
    own.register_buffer("mean", torch.zeros(2))
    found = survey(nn.Sequential(nn.BatchNorm1d(2), own))
    assert own in found.read_buffers
    assert len(found.read_buffers) == 1


def hooked(register):
    module = nn.Linear(2, 2)
    getattr(module, register)(lambda *_: None)
    return module


def replaced():
    module = nn.ReLU()
    module.forward = torch.relu
    return module


class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("make", "draws"),
    [
        (nn.ReLU, False),
        (batch_norm_net, False),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.LayerNorm(2)), False),
        (lambda: InvertibleSequential(*couplings(2, nn.Tanh)), False),
        (lambda: ReversibleBlock(nn.Tanh(), nn.Tanh()), False),
        (nn.Dropout, True),
        (lambda: nn.Dropout(0.5).eval(), True),  # the mode may change
        (nn.AlphaDropout, True),
        (nn.RReLU, True),
        (lambda: nn.MultiheadAttention(2, 1, dropout=0.1), True),
        (lambda: bottleneck(4, 0.5), True),
        (Own, True),
        (lambda: Subclass(2, 2), True),
        (lambda: nn.Sequential(nn.Linear(2, 2), Own()), True),
        (lambda: Function(torch.relu), True),
        (lambda: hooked("register_forward_hook"), True),
        (lambda: hooked("register_forward_pre_hook"), True),
        (replaced, True),
        (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), True),
    ],
)
def test_what_is_not_known_to_draw_nothing_may_draw(make, draws):
    assert survey(make()).may_draw is draws
    assert survey(nn.Sequential(nn.Identity(), make())).may_draw is draws


def test_hooks_on_all_modules_may_draw():
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert survey(nn.ReLU()).may_draw
    finally:
        hook.remove()
    assert not survey(nn.ReLU()).may_draw


def compiled_in_place():
    module = nn.ReLU()
    module.compile(backend="eager")
    return module


def compiled_forward():
    module = nn.ReLU()
    module.forward = torch.compile(module.forward, backend="eager")
    return module


@pytest.mark.parametrize(
    ("make", "compiled"),
    [
        (compiled_in_place, True),
        (compiled_forward, True),
        (lambda: torch.compile(nn.ReLU(), backend="eager"), True),
        (
            lambda: AdditiveCoupling(nn.Linear(2, 2)).compile_subnetworks(backend="eager"),
            True,
        ),
        (Own, False),
        (nn.ReLU, False),
    ],
)
def test_compiled_parts_are_found(make, compiled):
    assert survey(nn.Sequential(nn.Identity(), make())).may_be_compiled is compiled


def test_devices_without_numbers_are_not_listed():
    layer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    assert survey(layer).devices == []


def test_all_known_classes_exist_and_draw_nothing():
    """In train mode, whatever their arguments: checked on their source."""
    for name in _NEVER_DRAW:
        kind = getattr(nn, name, None)
        if kind is None:
            continue  # of a newer torch
        source = inspect.getsource(kind.forward) if "forward" in vars(kind) else ""
        assert "dropout" not in source, name
        assert "rrelu" not in source, name
