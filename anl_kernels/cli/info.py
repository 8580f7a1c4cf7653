"""`python -m anl_kernels info`: what can run here, what would, and why not the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from pathlib import Path

import torch

import anl_kernels

from .. import registry, trust
from .common import compiled_module, environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def backend_rows() -> list[tuple[str, bool, str]]:
    return [(b.name, b.available, b.reason) for b in anl_kernels.backends()]


def shadowed_module() -> str | None:
    """A hint where the source tree hides an installed package that has the compiled module."""
    here = Path(anl_kernels.__file__).resolve().parent
    if compiled_module() is not None:
        return None
    for folder in map(Path, sys.path):
        other = folder / "anl_kernels"
        if other.resolve() != here and any(other.glob("_cpu.*.so")):
            return f"{other} has the compiled module, but {here} was imported: run elsewhere, or pip install -e ."
    return None


def text() -> str:
    facts = environment()
    lines = [
        f"anl_kernels {anl_kernels.__version__} in {Path(anl_kernels.__file__).resolve().parent}",
        f"python {facts['python']}, torch {facts['torch']}, {facts['system']}",
        f"processor: {facts['device']}, {facts['threads']} threads (torch.get_num_threads)",
        f"gpu: {facts['gpu'] or 'none that torch can use'}",
        f"triton: {triton_line()}",
        "",
        "backends",
    ]
    for name, available, reason in backend_rows():
        lines.append(f"  {name:<10} {'available' if available else 'no':<10} {reason}")
    if facts["cpu_module"]:
        lines += ["", "compiled module anl_kernels._cpu"]
        for key, value in facts["cpu_module"].items():
            value = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            lines.append(f"  {key:<12} {value}")
    if cuda := cuda_module():
        lines += cuda_module_lines(cuda)
    lines += protocol_lines()
    devices = ["cpu"] + [kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()]
    lines += ["", *(f'backend="auto" takes, for a tensor on {device}: {chosen(device)}' for device in devices)]
    hint = shadowed_module()
    return "\n".join(lines + ([f"hint: {hint}"] if hint else []))


def triton_line() -> str:
    """Triton's version and, where it can run, what it compiles for."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    from ..backends import triton

    return version if triton.unavailable() else f"{version}, for {triton.target()}"


def cuda_module() -> dict | None:
    """What `anl_kernels._cuda` says of itself; None where it is not built."""
    from ..backends import cuda

    return dict(cuda.info()) if cuda._cuda else None


def cuda_module_lines(facts: dict) -> list[str]:
    archs = facts["archs"].split(";")
    lines = ["", "compiled module anl_kernels._cuda", f"  {'compiled for':<12} {facts['archs']}"]
    notes = []
    if all(arch.endswith("+PTX") for arch in archs):
        notes.append("PTX, no machine code: the driver compiles them when they first run on a GPU, and keeps that")
    if not facts["lean_kernels"]:
        notes.append("only the kernels that run every loss, without the leaner ones that suffice for most")
    if notes:
        notes.append("an install next to a GPU, or with ANL_KERNELS_CUDA_ARCHS, has machine code and all kernels")
    return lines + [f"  {'':<12} {note}" for note in notes]


def protocol_lines() -> list[str]:
    """Which protocols between CTAs `auto` uses on the current GPU."""
    found = []
    available = {b.name for b in anl_kernels.backends() if b.available}
    for backend, protocols in trust.PROTOCOLS.items():
        if backend in available and not registry.is_interpreted(backend):
            device = registry.device_of(backend)
            allowed = trust.trusted(backend, device, explicit=False)
            for name, purpose in protocols.items():
                state = "yes" if name in allowed else "no, not verified here: python -m anl_kernels check"
                found.append(f"  {backend}.{name:<10} {state} ({purpose})")
    return ["", 'protocols between CTAs that backend="auto" uses on this GPU', *found] if found else []


def chosen(device: str) -> str:
    """What a plain call takes on `device`, and why."""
    forced = os.environ.get("ANL_KERNELS_BACKEND", "auto")
    if forced != "auto":
        return f"{forced}, as ANL_KERNELS_BACKEND says"
    available = {b.name for b in anl_kernels.backends() if b.available}
    first = next((name for name in registry.FUSED_BY_DEVICE[device] if name in available), "reference")
    return f"{first}, the fastest that can run; a call that it cannot do goes to the next, and that is logged once"


def run(args: argparse.Namespace) -> int:
    if args.json:
        import json

        rows = [{"name": n, "available": a, "reason": r} for n, a, r in backend_rows()]
        print(json.dumps({**environment(), "cuda_module": cuda_module(), "backends": rows}, indent=1, default=str))
    else:
        print(text())
    return 0
