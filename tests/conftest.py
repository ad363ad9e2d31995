"""Shared by all tests: determinism, and quiet Lightning."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    # A test that switched the default would otherwise switch it for every later one.
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def double() -> None:
    """Check mathematics in float64."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture(autouse=True, scope="session")
def _quiet_lightning() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)
