"""What the commands share: optional libraries, tables, and the description of this machine."""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import sys
from pathlib import Path

import torch

import anl_kernels


def need(module: str, extra: str):
    """Imports an optional library; if it is missing, ends the command with a sentence that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        sys.exit(
            f"anl_kernels: this command needs {package}, which is not installed: "
            f"pip install {package} (or install anl_kernels with its extra [{extra}])."
        )


def table(rows: list[list], headers: list[str], **options) -> str:
    return need("tabulate", "cli").tabulate(rows, headers, tablefmt="simple", disable_numparse=True, **options)


def progress(total: int, unit: str, quiet: bool = False):
    """A progress bar on stderr; none where stderr is no terminal."""
    return need("tqdm", "cli").tqdm(total=total, unit=unit, leave=False, disable=True if quiet else None)


def output_file(text: str) -> str:
    """The type of an argument that names a file to write: what stands in its way is said before anything is done."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r} to write {text!r} in")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return text


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def compiled_module():
    """`anl_kernels._cpu`, or None where it is not built."""
    try:
        return importlib.import_module("anl_kernels._cpu")
    except ImportError:
        return None


def environment() -> dict:
    """This machine and these versions, for a result that is kept."""
    compiled = compiled_module()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "anl_kernels": anl_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # of the minute before
        "cpu_module": dict(compiled.info()) if compiled else None,
    }
