"""What the examples in docstrings may use without importing it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import invertible


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace |= {name: getattr(invertible, name) for name in invertible.__all__}
    doctest_namespace |= {"torch": torch, "nn": nn, "np": np}
