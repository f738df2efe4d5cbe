"""Hypothesis profiles, a seed for torch, and files that are slow as a whole."""

import os

import pytest
import torch
from hypothesis import register_random, settings

# No deadline: the first call of an operation takes long.
settings.register_profile("dev", deadline=None, max_examples=25)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, max_examples=15)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


class _TorchRandom:
    """torch's generator as Hypothesis wants it: seeded for each example, so that each repeats."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = _TorchRandom()  # Hypothesis holds it by a weak reference
register_random(TORCH_RANDOM)

# The tensors are small: a second thread would only wait for the first. So it is in the processes
# that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# Some start processes, compile or measure; a slow test elsewhere has the mark itself.
SLOW = (
    "tests/benchmarks/",
    "tests/checkpointing/test_compile.py",
    "tests/checkpointing/test_distributed.py",
    "tests/exact/test_tracing.py",
    "tests/exact/test_exact.py::test_a_thousand_blocks",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker("slow")
