"""Two processes train as one does, under DistributedDataParallel and under fully_shard."""

import gc
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed.fsdp
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.nn.parallel import DistributedDataParallel
from toys import body
from toys import body_images as images

from invertible import (
    AdditiveCoupling,
    InvertibleSequential,
    Merge,
    Permute,
    Quantize,
    ReversibleBlock,
    Split,
    Swap,
)

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or sys.platform == "win32", reason="needs gloo"
)
shards = pytest.mark.skipif(torch.__version__ < (2, 7), reason="no fully_shard on a CPU")


def residual() -> nn.Module:
    """Without batch statistics, which would differ between half a batch and a whole one."""
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1))


def network(**options):
    torch.manual_seed(0)
    return body(4, residual, **options)


class CausalAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """A small language model whose head has the weights of its embedding."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.places = nn.Parameter(torch.randn(6, 16))
        blocks = (ReversibleBlock(CausalAttention(), self.feed_forward()) for _ in range(3))
        self.blocks = InvertibleSequential(Split(dim=-1), *blocks, Merge(dim=-1), **options)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def feed_forward(self):
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, tokens):
        return self.head(self.blocks(self.embed(tokens) + self.places))


def gpt(**options):
    torch.manual_seed(0)
    return GPT(**options).double()


def sentences():
    return torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(3))


def gradients(model, x):
    model(x).sin().mean().backward()
    return [p.grad for p in model.parameters()]


def ddp(model):
    return DistributedDataParallel(model)


def fsdp(model):
    for layer in model:
        if isinstance(layer, AdditiveCoupling):
            distributed.fsdp.fully_shard(layer.f)
    return distributed.fsdp.fully_shard(model)


def fsdp_of_layers(model):
    """Sharded by layers, which then have hooks."""
    for layer in model:
        if isinstance(layer, AdditiveCoupling):
            distributed.fsdp.fully_shard(layer)
    return distributed.fsdp.fully_shard(model)


def fsdp_of_blocks(model):
    """Sharded by compositions inside the composition, which then have hooks."""
    model = type(model)(model[:2], model[2:6], model[6:], checkpoint=model.checkpoint)
    for block in list(model)[1:]:
        distributed.fsdp.fully_shard(block)
    return distributed.fsdp.fully_shard(model)


def fsdp_of_gpt(model):
    for block in list(model.blocks)[1:-1]:
        for part in (block.f, block.g):
            distributed.fsdp.fully_shard(part)
    return distributed.fsdp.fully_shard(model)


def whole(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


class Case(NamedTuple):
    """A network, its input, and how processes share it."""

    make: Callable[..., nn.Module]
    x: torch.Tensor
    wrap: Callable[[nn.Module], nn.Module]


CASES = {
    "images, ddp": Case(network, images(4), ddp),
    "images, fsdp": Case(network, images(4), fsdp),
    "images, fsdp of layers": Case(network, images(4), fsdp_of_layers),
    "images, fsdp of blocks": Case(network, images(4), fsdp_of_blocks),
    "gpt, ddp": Case(gpt, sentences(), ddp),
    "gpt, fsdp": Case(gpt, sentences(), fsdp_of_gpt),
}
if torch.__version__ < (2, 7):  # no fully_shard on a CPU
    CASES = {name: case for name, case in CASES.items() if "fsdp" not in name}


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    try:
        results = {}
        for name, (make, x, wrap) in CASES.items():
            for checkpoint in (False, True):
                model = wrap(make(checkpoint=checkpoint))
                for _ in range(2):
                    model.zero_grad()
                    found = gradients(model, x[2 * rank : 2 * rank + 2])
                results[name, checkpoint] = [whole(gradient) for gradient in found]
        if rank == 0:
            torch.save(results, Path(folder) / "gradients.pt")
        distributed.barrier()
    finally:
        del model
        gc.collect()  # else some processes abort at exit
        distributed.destroy_process_group()


q = 2**-20


def of_linears(quantum=None, **options):
    torch.manual_seed(0)
    first = [Quantize(quantum)] if quantum else [Permute.random(8, seed=0)]
    layers = (
        layer for _ in range(2) for layer in (AdditiveCoupling(mlp(), quantum=quantum), Swap())
    )
    return InvertibleSequential(*first, Split(dim=1), *layers, Merge(dim=1), **options).double()


def mlp():
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))


def tokens():
    return torch.randn(4, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


PLACEMENTS = {"batch": Shard(0), "channels": Shard(1), "space": Shard(2), "copies": Replicate()}


def work_on_dtensors(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    try:
        mesh = init_device_mesh("cpu", (2,))
        results = {}
        for name, placement in PLACEMENTS.items():
            for quantum in (None, q):
                model = of_linears(quantum, checkpoint=True)
                distribute_module(model, mesh)
                y = model(distribute_tensor(tokens(), mesh, [placement]))
                y.sin().mean().backward()
                model.inverse(y.detach())
                results[name, quantum] = [whole(p.grad) for p in model.parameters()]
        if rank == 0:
            torch.save(results, Path(folder) / "gradients.pt")
        distributed.barrier()
    finally:
        gc.collect()
        distributed.destroy_process_group()


@shards
def test_distributed_tensors_have_the_gradients_of_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work_on_dtensors, args=(port, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for (_, quantum), gradients_of_two in found.items():
        expected = gradients(of_linears(quantum), tokens())
        torch.testing.assert_close(gradients_of_two, expected, rtol=1e-5, atol=1e-7)
    assert len(found) == 2 * len(PLACEMENTS)


@pytest.fixture(scope="module")
def gradients_of_two(tmp_path_factory):
    """Those of all cases, from the same two processes, which take seconds to import torch."""
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, args=(port, str(folder)), nprocs=2)
    return torch.load(folder / "gradients.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradients_of_one(name, gradients_of_two):
    make, x, _ = CASES[name]
    expected = gradients(make(), x)
    for checkpoint in (False, True):
        found = gradients_of_two[name, checkpoint]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
