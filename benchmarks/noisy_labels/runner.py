"""Many runs, some at once, each kept as it ends: what is done is not done again."""

from __future__ import annotations

import json
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path

import torch

from anl_kernels.cli.common import environment, progress

from .train import Run, Where, replace, train

_epochs = None  # in a worker: the shared count of epochs done


def _start(counter, threads: int) -> None:
    global _epochs
    _epochs = counter
    torch.set_num_threads(threads)


def _count(epochs: int) -> None:
    with _epochs.get_lock():
        _epochs.value += epochs


def _train(run: Run, where: Where) -> dict:
    return train(run, where, _count)


def run_all(runs: list[Run], where: Where, workers: int, threads: int = 1) -> list[dict]:
    """The runs' results, in their order. Every run has its own process state: results do not depend on `workers`."""
    where.folder.mkdir(parents=True, exist_ok=True)
    with progress(sum(run.epochs for run in runs), "epoch") as bar:
        if workers == 1:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                return [train(run, where, bar.update) for run in runs]
            finally:
                torch.set_num_threads(before)
        context = multiprocessing.get_context("spawn")  # CUDA allows no fork
        counter = context.Value("q", 0)
        with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(counter, threads)) as pool:
            running = [pool.submit(_train, run, where) for run in runs]
            left = set(running)
            while left:
                finished, left = wait(left, timeout=1.0, return_when="FIRST_COMPLETED")
                bar.update(counter.value - bar.n)
                failed = next((job for job in finished if job.exception()), None)
                if failed:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise failed.exception()
            return [job.result() for job in running]


def write_results(results: list[dict], file: Path, command: str) -> None:
    """One JSON file: the machine, the command, and every run with its curves."""
    content = {"environment": environment(), "command": command, "runs": results}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, lambda part: part.write_text(indented(content)))


def indented(content: dict) -> str:
    """JSON with a line per value, but lists of numbers on one line: a curve is one line."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\n([^][{}\"]*?)\n *\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"
