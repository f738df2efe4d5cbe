"""Hypothesis profiles, and torch's generator in Hypothesis's hands."""

import os

import pytest
import torch
from hypothesis import settings

# No deadline: the first call of an operation takes long.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# Two threads at most, so that many small operations do not wait for each other.
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
