"""Processes that fork after the kernels have used threads: a DataLoader's workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import anl_kernels as ak

WORKERS = """
import torch
import anl_kernels as ak

class Losses(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        logits, target = torch.randn(2048, 300, generator=generator).requires_grad_(), torch.arange(2048) % 300
        hidden, weight = torch.randn(256, 16, generator=generator), torch.randn(300, 16, generator=generator)
        loss = ak.anl_ce(logits, target, backend="cpu") + ak.linear_anl_ce(hidden, weight, target[:256])
        (grad,) = torch.autograd.grad(loss, logits)
        return loss.detach(), grad

torch.set_num_threads(4)
here = [Losses()[index] for index in range(2)]
loader = torch.utils.data.DataLoader(Losses(), batch_size=None, num_workers=2, multiprocessing_context="fork")
for (loss, grad), (loss_there, grad_there) in zip(here, loader, strict=True):
    torch.testing.assert_close((loss_there, grad_there), (loss, grad))
print("through")
"""


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_loss_in_a_data_loader_s_workers(cpu):
    """A worker has none of the threads that its parent's pool had, and one thread of its own."""
    env = {**os.environ, "PYTHONPATH": str(Path(ak.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", WORKERS], capture_output=True, text=True, env=env, cwd="/", timeout=60
    )
    assert result.stdout == "through\n", result.stderr[-2000:]
