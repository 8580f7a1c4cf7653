"""Without a GPU the kernels run under Triton's interpreter on CPU tensors (see the conftest above)."""

from pathlib import Path

import devices
import pytest
import torch

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if devices.GPU and item.path.is_relative_to(HERE) and "device" in item.fixturenames:
            item.add_marker("gpu")


@pytest.fixture
def device():
    return torch.device(devices.GPU or "cpu")
