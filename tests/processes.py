"""Two processes that train together, started without torchrun, which would import torch as well."""

import os
import socket
import subprocess
import sys


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_two(*arguments: str) -> list[tuple[int, str, str]]:
    """Runs Python twice as torchrun would; the status of each, and what it printed.

    They import what this process can, and set ``MASTER_PORT`` themselves before they join.
    """
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=300) for process in processes]
    return [(p.returncode, *outputs) for p, outputs in zip(processes, printed, strict=True)]
