"""Two processes that train a flow have the gradients of one."""

import gc
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from invertible import AffineCoupling, Flow, InvertibleSequential, Merge, Split, Swap

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not distributed.is_available() or sys.platform == "win32", reason="needs gloo"
    ),
]


def flow_of(*, checkpoint: bool) -> Flow:
    torch.manual_seed(0)
    couplings = [layer for _ in range(4) for layer in (AffineCoupling(nn.Linear(2, 4)), Swap())]
    layer = InvertibleSequential(Split(), *couplings, Merge(), checkpoint=checkpoint)
    return Flow(layer, event_shape=(4,)).double()


def data():
    return torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def ddp(flow):
    model = DistributedDataParallel(flow)
    return lambda x: model().log_prob(x)


def fsdp(flow):
    distributed.fsdp.fully_shard(flow)
    distributed.fsdp.register_fsdp_forward_method(flow, "log_prob")
    return flow.log_prob


WRAPS = [ddp] if torch.__version__ < (2, 7) else [ddp, fsdp]  # which can shard on a CPU


def gradients(flow):
    found = [p.grad for p in flow.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    try:
        results = []
        for wrap in WRAPS:
            for checkpoint in (False, True):
                flow = flow_of(checkpoint=checkpoint)
                log_prob = wrap(flow)
                (-log_prob(data()[rank::2]).mean()).backward()
                results.append(gradients(flow))
        if rank == 0:
            torch.save(results, Path(folder) / "gradients.pt")
        distributed.barrier()
    finally:
        del flow, log_prob
        gc.collect()  # else some processes abort at exit
        distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, args=(port, str(tmp_path)), nprocs=2)
    one = flow_of(checkpoint=False)
    (-one.log_prob(data()).mean()).backward()
    for found in torch.load(tmp_path / "gradients.pt", weights_only=True):
        torch.testing.assert_close(found, gradients(one))
