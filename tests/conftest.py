"""Hypothesis profiles, and torch's generator in Hypothesis's hands."""

import os

import pytest
import torch
from hypothesis import settings

# No deadline: the first call of an operation takes long.
settings.register_profile("dev", deadline=None, max_examples=25)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# The tensors are small: a second thread would only wait for the first.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
