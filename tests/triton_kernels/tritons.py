"""The releases of Triton that stock PyTorch brings, side by side with the one that is installed here."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from filelock import FileLock

INSTALLED = importlib.metadata.version("triton")
STOCK = ("3.6.0", "3.7.1")  # PyTorch 2.11's, and 2.13's
RELEASES = tuple(dict.fromkeys((*STOCK, INSTALLED)))
FOLDERS = Path(__file__).parents[2] / "build"


class NotToBeHad(Exception):
    """A release that cannot be fetched here, and why."""


def folder_of(release: str) -> Path | None:
    """Where `release` is, for offline.in_a_process; None for the installed one. The test is skipped without it."""
    if release == INSTALLED:
        return None
    try:
        return _fetched(release)
    except NotToBeHad as error:
        pytest.skip(f"Triton {release} is not here and cannot be fetched: {error}")


@lru_cache(maxsize=len(RELEASES))
def _fetched(release: str) -> Path:
    """Made once, by one process, and kept."""
    FOLDERS.mkdir(exist_ok=True)
    folder = FOLDERS / f"triton-{release}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _fetch(release, folder)
    return folder


def _fetch(release: str, folder: Path) -> None:
    begun = folder.with_name(f"{folder.name}.begun")  # what is cut short does not count
    shutil.rmtree(begun, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--retries", "1"]
    command += ["--only-binary", ":all:", "--target", str(begun), f"triton=={release}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        raise NotToBeHad("four minutes were not enough") from None
    if done.returncode:
        raise NotToBeHad((done.stderr.strip() or "pip does not say why").splitlines()[-1])
    os.rename(begun, folder)
