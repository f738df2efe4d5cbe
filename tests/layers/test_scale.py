"""ActNorm begins with the statistics of a batch, once and for all processes; Scale scales."""

import copy
import gc
import re
import socket
import sys

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from toys import assert_same_gradients, both, copied_in_both_ways, images

from invertible import ActNorm, AffineCoupling, Inverse, InvertibleSequential, Merge, Scale, Split


def batch(seed=0):
    """Channels with means and deviations of their own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64, generator=generator)
    return x * torch.tensor([0.1, 1.0, 50.0]).view(3, 1, 1) + torch.tensor([1.0, 0.0, 1e3]).view(
        3, 1, 1
    )


@pytest.mark.parametrize("dim", [1, 2, -1])
def test_the_first_batch_comes_out_with_mean_zero_and_deviation_one(dim):
    x = batch().movedim(1, dim)
    others = [i for i in range(4) if i != dim % 4]
    y = ActNorm(3, dim=dim).double()(x)
    torch.testing.assert_close(y.mean(others), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(y.std(others, correction=0), torch.ones(3, dtype=torch.float64))


def test_only_the_first_batch_decides():
    layer = ActNorm(3).double()
    layer(batch())
    before = copy.deepcopy(layer.state_dict())
    layer(batch(1))
    layer.eval()(batch(2))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_a_batch_can_be_handed_over_by_hand():
    layer = ActNorm(3).double().eval()
    layer.initialise(batch())
    torch.testing.assert_close(layer.inverse(layer(batch())), batch())
    layer.initialise(batch(1))  # also again
    assert layer(batch(1)).mean().abs() < 1e-12


# FrEIA's, once reloaded, begins again.
@copied_in_both_ways
def test_a_layer_that_has_begun_does_not_begin_again_when_it_is_loaded(again):
    layer = ActNorm(3).double()
    layer(batch())
    expected = layer(batch(1))
    for other in (ActNorm(3).double(), again(layer), ActNorm(3).double().eval()):
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(batch(1)), expected)
    fresh = ActNorm(3).double()
    fresh(batch(2))
    fresh.load_state_dict(ActNorm(3).state_dict())
    fresh(batch())
    torch.testing.assert_close(fresh.log_scale, layer.log_scale)


def test_whether_it_has_begun_stands_in_the_state_dict():
    layer = ActNorm(3)
    assert not layer.state_dict()["initialised"]
    layer(batch().float())
    assert layer.state_dict()["initialised"]
    assert ActNorm(3, initialised=True).state_dict()["initialised"]


def test_it_stands_there_too_when_forward_ran_within_an_inverse():
    layer = ActNorm(3).double()
    Inverse(layer).inverse(batch())
    other = ActNorm(3).double()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(batch(1)), layer(batch(1)), rtol=0, atol=0)


# nflows takes it in silence.
@pytest.mark.parametrize(
    ("run", "what"),
    [
        (lambda layer: layer.inverse(batch()), "its inverse was called"),
        (lambda layer: layer.inverse_and_log_det(batch()), "its inverse was called"),
        (lambda layer: layer.eval()(batch()), "it was called in eval mode"),
        (lambda layer: layer.eval().forward_and_log_det(batch()), "it was called in eval mode"),
    ],
)
def test_before_the_first_batch_nothing_else_can_be_run(run, what):
    message = (
        f"ActNorm begins with the statistics of a first batch, and {what} before there was one. "
        "Run a batch through forward in train mode, call initialise(x), load a state_dict, or make "
        "it with initialised=True."
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run(ActNorm(3).double())


def test_a_layer_that_is_trained_through_its_inverse_begins_as_the_identity():
    layer = ActNorm(3, initialised=True).double()
    torch.testing.assert_close(layer.inverse(batch()), batch(), rtol=0, atol=0)
    torch.testing.assert_close(layer(batch()), batch(), rtol=0, atol=0)


# FrEIA#121; nflows and normflows make NaN of both.
def test_a_constant_channel_is_shifted_and_not_scaled():
    x = batch()
    x[:, 1] = 0.1
    x[:, 2] = 0
    layer = ActNorm(3).double()
    y, log_det = layer.forward_and_log_det(x)
    assert y.isfinite().all()
    assert log_det.isfinite().all()
    assert y[:, 1:].abs().max() < 1e-15
    assert layer.log_scale[1:].tolist() == [0, 0]
    torch.testing.assert_close(layer.inverse(y), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_constant_channel_is_known_in_low_precision_too(dtype):
    x = torch.full((100, 1, 7, 7), 0.3, dtype=dtype)
    layer = ActNorm(1)
    layer(x)
    assert layer.log_scale.item() == 0


def test_a_batch_that_cannot_tell_a_deviation_is_refused():
    with pytest.raises(
        ValueError, match=r"a single value a channel \(input shape \(1, 3\)\)\. Beg"
    ):
        ActNorm(3)(torch.randn(1, 3))
    layer = ActNorm(3)
    with pytest.raises(ValueError, match="values which are not finite"):
        layer(torch.full((4, 3), torch.nan))
    assert not layer.initialised
    ActNorm(3)(torch.randn(1, 3, 4, 4))  # many values of one example


@pytest.mark.parametrize("way", ["forward", "forward_and_log_det"])
def test_rebuilding_is_right_from_the_first_step_on(way):
    def make():
        f = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 1))
        return InvertibleSequential(
            ActNorm(4), Split(), AffineCoupling(f), Merge(), ActNorm(4), Scale(4)
        ).double()

    x = images(4, 4, 4, 4).requires_grad_()

    def loss(network):
        results = getattr(network, way)(x)
        y, log_det = results if "log_det" in way else (results, torch.zeros(()))
        return (y.sin() * y).sum() + log_det.sum()

    networks = both(make)
    for _ in range(2):
        assert_same_gradients(networks, loss)
    for one, other in zip(*(network.state_dict().values() for network in networks), strict=True):
        assert torch.equal(one, other)


def test_the_state_stays_float32_under_autocast():
    layer = ActNorm(3)
    with torch.autocast("cpu", torch.bfloat16):
        y, log_det = layer.forward_and_log_det(batch().float())
    assert y.dtype == log_det.dtype == torch.float32


def test_the_log_determinant_is_the_sum_of_the_log_scales_for_each_place():
    layer = Scale(3).double()
    nn.init.normal_(layer.log_scale)
    y, log_det = layer.forward_and_log_det(batch())
    torch.testing.assert_close(y, batch() * layer.log_scale.exp().view(3, 1, 1))
    assert log_det.shape == (8,)
    torch.testing.assert_close(log_det, (16 * layer.log_scale.sum()).expand(8))
    torch.testing.assert_close(layer.inverse_and_log_det(y)[1], -log_det)


@pytest.mark.parametrize("make", [ActNorm, Scale])
def test_other_channels_dimensions_and_numbers_are_refused(make):
    name = make.__name__
    with pytest.raises(ValueError, match=rf"{name} takes 3 channels along dimension 1, got 4"):
        make(3)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=rf"{name} takes channels of at least 1, got 0"):
        make(0)
    with pytest.raises(ValueError, match=rf"{name} cannot take dim=0"):
        make(3, dim=0)
    with pytest.raises(TypeError, match=rf"{name} computes with its input"):
        make(3)(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=rf"{name} computes with real numbers"):
        make(3)(torch.zeros(2, 3, dtype=torch.complex64))


def begin_together(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    try:
        x = batch()[4 * rank : 4 * rank + 4]
        model = DistributedDataParallel(InvertibleSequential(ActNorm(3), checkpoint=True).double())
        model(x).square().sum().backward()
        whole = ActNorm(3).double()
        mean = batch().mean((0, 2, 3))
        torch.testing.assert_close(model.module[0].shift, -mean)
        others = [torch.zeros(3, dtype=torch.float64) for _ in range(2)]
        distributed.all_gather(others, model.module[0].log_scale.detach())
        assert torch.equal(*others)
        if torch.__version__ >= (2, 7):
            late = torch.distributed.fsdp.fully_shard(InvertibleSequential(whole))
            with pytest.raises(RuntimeError, match="can't begin from a batch under fully_shard"):
                late(x)
            early = InvertibleSequential(ActNorm(3).double())
            early(x)
            torch.distributed.fsdp.fully_shard(early)(x).sum().backward()
            del early, late
        distributed.barrier()
    finally:
        del model
        gc.collect()  # else some processes abort at exit
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available() or sys.platform == "win32", reason="needs gloo")
def test_processes_begin_alike_and_before_they_shard():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(begin_together, args=(port,), nprocs=2)
