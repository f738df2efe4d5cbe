"""``measure_memory`` says what a training step will take, and touches nothing."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from invertible import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    InjectivePad,
    InvertibleSequential,
    Merge,
    OnStreams,
    Quantize,
    Rebuild,
    ReversibleBlock,
    Split,
    Swap,
    measure_memory,
    reversible_checkpoint,
)


def convolutions(channels=16):
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


class Classifier(nn.Module):
    def __init__(self, *layers, checkpoint=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.body = InvertibleSequential(Split(), *layers, Merge(), checkpoint=checkpoint)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


def bottlenecks(**options):
    blocks = [ReversibleBlock(convolutions(), convolutions()) for _ in range(3)]
    return Classifier(*blocks, **options)


def glow():
    steps = [
        layer
        for _ in range(3)
        for layer in (
            ActNorm(32),
            Split(),
            AffineCoupling(nn.Conv2d(16, 32, 3, padding=1)),
            Merge(),
        )
    ]
    return InvertibleSequential(*steps, checkpoint=True)


def transformer():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x):
            return self.attend(x, x, x, need_weights=False)[0]

    def feed_forward():
        return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

    blocks = [ReversibleBlock(Attention(), feed_forward()) for _ in range(3)]
    return InvertibleSequential(Split(dim=-1), *blocks, Merge(dim=-1), checkpoint=True)


CASES = {
    "bottlenecks": (bottlenecks, (16, 3, 32, 32)),
    "anchors": (lambda: bottlenecks(checkpoint=Rebuild(anchor_every=2)), (16, 3, 32, 32)),
    "a flow that sees data first": (glow, (16, 32, 16, 16)),
    "transformer": (transformer, (16, 256, 64)),
}


def measured(network, x, optimizer):
    """What the allocator says of the second step: held between the passes, and at most."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    network(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = network(x)
        with record_function("between"):
            pass
        y.sum().backward()
        optimizer.step()
    now = held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "between":
            held = now
        elif event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    there = [x, *network.parameters(), *network.buffers()]
    there += [s for state in optimizer.state.values() for s in state.values()]
    return held, peak + sum(t.nbytes for t in there)


@pytest.mark.parametrize("way", ["stored", "as_set"])
@pytest.mark.parametrize("case", CASES)
def test_it_agrees_with_the_allocator(case, way):
    make, shape = CASES[case]
    network, x = make(), torch.randn(shape)
    optimizer = torch.optim.Adam(network.parameters())
    found = getattr(measure_memory(network, x, optimizer), way)
    if way == "stored":
        for part in network.modules():
            if isinstance(part, InvertibleSequential):
                part.checkpoint = False
    held, peak = measured(network, x, optimizer)
    assert found.held == pytest.approx(held, rel=0.05)
    assert found.peak == pytest.approx(peak, rel=0.25)


def test_rows_name_what_holds_memory_and_add_up():
    memory = measure_memory(bottlenecks(), torch.empty(16, 3, 32, 32))
    names = [row.layer for row in memory.rows]
    assert names[:3] == [
        "stem (Conv2d)",
        "body.1.f (AdditiveCoupling)",
        "body.1.g (AdditiveCoupling)",
    ]
    assert "head.2 (Linear)" in names
    assert sum(row.stored for row in memory.rows) == memory.stored.held
    assert sum(row.as_set for row in memory.rows) == memory.as_set.held


def test_printed_it_is_a_table():
    memory = measure_memory(bottlenecks(), torch.empty(16, 3, 32, 32))
    lines = str(memory).splitlines()
    assert lines[0].split() == ["MiB", "stored", "as", "set"]
    assert lines[1].split() == ["stem", "(Conv2d)", "2.00", "0.00"]
    assert [line.split("  ")[0] for line in lines[-6:]] == [
        "held in all",
        "input",
        "parameters, buffers",
        "gradients",
        "optimizer",
        "peak of all",
    ]


def test_depth_costs_nothing_but_weights_if_all_is_rebuilt():
    def held(depth):
        blocks = [ReversibleBlock(convolutions(), convolutions()) for _ in range(depth)]
        return measure_memory(Classifier(*blocks), torch.empty(4, 3, 16, 16))

    few, many = held(2), held(8)
    assert many.as_set.held == few.as_set.held
    assert many.stored.held > 3 * few.stored.held


def test_weights_gradients_and_the_optimizer_are_counted():
    network = InvertibleSequential(Split(), AdditiveCoupling(nn.Linear(8, 8)))
    size = (8 * 8 + 8) * 4
    x = torch.empty(2, 16)
    assert measure_memory(network, x)[3:] == (x.nbytes, size, size, 0)
    momentum = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    assert measure_memory(network, x, momentum).optimizer == size
    network(torch.randn(2, 16))[0].sum().backward()
    momentum.step()
    assert measure_memory(network, x, momentum).optimizer == size


def test_nothing_is_touched():
    network, x = bottlenecks(), torch.randn(4, 3, 16, 16)
    optimizer = torch.optim.Adam(network.parameters())
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    measure_memory(network, x, optimizer)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in network.parameters())
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), state)
    network(x).sum().backward()


def test_a_step_that_needs_values_leaves_no_trace_either():
    network, x = glow(), torch.randn(4, 32, 4, 4)
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    measure_memory(network, x)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_that_fits_no_memory_is_measured():
    wide = 2**16
    with torch.device("meta"):
        block = ReversibleBlock(nn.Linear(wide, wide), nn.Linear(wide, wide))
        network = InvertibleSequential(Split(), block, checkpoint=True)
        memory = measure_memory(network, torch.empty(2**10, 2 * wide))
    assert memory.parameters == 2 * (wide * wide + wide) * 4
    assert memory.as_set.peak > 2 * memory.parameters


def test_calls_of_reversible_checkpoint_are_stored_and_rebuilt():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = InvertibleSequential(
                Split(), *[ReversibleBlock(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(4)]
            )

        def forward(self, x):
            y1, y2 = reversible_checkpoint(self.layers, x)
            return y1 * y2

    memory = measure_memory(Whole(), torch.empty(128, 128))
    assert memory.as_set.held < memory.stored.held / 2


def test_a_context_a_state_of_streams_and_a_grid():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, context):
            return self.linear(x + context["shift"])

    layers = [AdditiveCoupling(Shift(), conditional=True, quantum=2**-12), Swap()]
    first = OnStreams(0, Quantize(2**-12))
    network = InvertibleSequential(first, *layers, *layers, *layers, checkpoint=True)
    x = torch.empty(16, 8), torch.empty(16, 8)
    memory = measure_memory(network, x, context={"shift": torch.empty(8)})
    assert memory.stored.held > memory.as_set.held > 0


def test_of_a_network_that_pads():
    network = InvertibleSequential(InjectivePad(4), Split(), AdditiveCoupling(nn.Conv2d(4, 4, 1)))
    assert measure_memory(network, torch.empty(2, 4, 8, 8)).stored.held > 0


def test_what_is_no_module_and_no_optimizer_is_an_error():
    x = torch.empty(2, 4)
    with pytest.raises(TypeError, match="measure_memory takes a module, got"):
        measure_memory(torch.sin, x)
    with pytest.raises(TypeError, match=r"measure_memory takes a torch.optim.Optimizer"):
        measure_memory(nn.Linear(4, 4), x, torch.optim.Adam)


def test_optimizers_that_do_not_fit_are_errors():
    x, network = torch.empty(2, 4), nn.Linear(4, 4)
    with pytest.raises(ValueError, match="got 2 in Adam that are not among them"):
        measure_memory(network, x, torch.optim.Adam(nn.Linear(4, 4).parameters()))
    with pytest.raises(ValueError, match="can't count LBFGS"):
        measure_memory(network, x, torch.optim.LBFGS(network.parameters()))


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_training_is_measured_wherever_one_asks_from(around):
    network, x = bottlenecks(), torch.empty(2, 3, 8, 8)
    with around():
        found = measure_memory(network, x)
    assert found == measure_memory(network, x)
    assert found.stored.held > found.as_set.held > 0


def test_parameters_that_are_yet_to_be_made_are_an_error():
    with pytest.raises(ValueError, match="can't count weight, which the first run"):
        measure_memory(nn.LazyLinear(4), torch.empty(2, 4))


def test_errors_of_the_network_are_its_own():
    with pytest.raises(RuntimeError, match=r"\[2, 5\]"):
        measure_memory(nn.Linear(4, 4), torch.empty(2, 5))
