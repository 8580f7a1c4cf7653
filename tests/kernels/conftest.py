"""Without a GPU the kernels run under Triton's interpreter on CPU tensors (see the conftest above)."""

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
