"""Which protocols between the CTAs of one launch may run on a GPU.

A kernel whose CTAs wait for one another (tickets, spin waits, clusters, bulk copies) hangs or kills the context where
the GPU, the driver or the compiler does not do what it was written for. `auto` runs such a kernel only on a GPU where
it is verified: in the table below, or by `python -m anl_kernels check` on the user's own GPU. Elsewhere the same phases
run as launches of their own, in stream order. An explicit backend trusts all of its protocols.
"""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from typing import NamedTuple

import torch

from .cache import File
from .layout import log_once

# backend -> its protocols, each with what it is for.
PROTOCOLS = {
    "cuda": {
        "tickets": "the last CTA to finish adds up the loss; a kernel starts while its mean's denominator is made",
        "split": "the CTAs that share a row wait for one another",
        "cluster": "clusters, distributed shared memory and bulk copies",
    },
    "triton": {"split": "the programs that share a row wait for one another"},
}
VARIABLE = "ANL_KERNELS_TRUST"
# {key_of(protocol, device): {"date": ..., ...}}
FILE = File("verified.json", "protocols count as not verified", "what was verified is not remembered")


class Verified(NamedTuple):
    arch: str  # "sm_90", as `arch_of` says
    protocol: str  # "cuda.tickets"
    versions: dict  # of anl_kernels and, for triton, of Triton


# What the maintainers verified on their own GPUs. None has run there yet.
SHIPPED: tuple[Verified, ...] = ()


def trusted(backend: str, device: torch.device, explicit: bool) -> frozenset[str]:
    """The protocols of `backend` that a call may use. explicit: the caller, or ANL_KERNELS_BACKEND, names the backend.

    ANL_KERNELS_TRUST=all, none or a list such as "cuda.tickets,triton.split" overrides both.
    """
    return _trusted(backend, device, explicit, os.environ.get(VARIABLE, ""))


@lru_cache(maxsize=256)
def _trusted(backend, device, explicit, variable):
    known = PROTOCOLS[backend]
    if variable:
        return frozenset(name for name in known if variable == "all" or f"{backend}.{name}" in _listed(variable))
    if explicit:
        return frozenset(known)
    found = frozenset(name for name in known if is_verified(f"{backend}.{name}", device))
    if missing := [name for name in known if name not in found]:
        log_once(
            f"anl_kernels: backend {backend} on {device_name(device)}: not verified here, so what they do is done by "
            f"launches of their own: {', '.join(missing)}. `python -m anl_kernels check` verifies them and remembers "
            f"it; {VARIABLE}=all takes them unseen."
        )
    return found


def _listed(variable: str) -> list[str]:
    if variable == "none":
        return []
    names = variable.replace(",", " ").split()
    all_ = [f"{backend}.{name}" for backend, protocols in PROTOCOLS.items() for name in protocols]
    if unknown := [name for name in names if name not in all_]:
        raise ValueError(f"{VARIABLE}={variable!r}: {unknown[0]!r} is not one of {', '.join(all_)}, all, none")
    return names


def is_verified(protocol: str, device: torch.device) -> bool:
    """Whether `protocol` ("cuda.tickets") was verified on GPUs of this kind, with these versions."""
    shipped = any(v[:2] == (arch_of(device), protocol) and v.versions == versions_of(protocol) for v in SHIPPED)
    return shipped or key_of(protocol, device) in FILE.read()


def record(protocol: str, device: torch.device, facts: dict) -> bool:
    """Remembers, for this user, that `protocol` was verified on GPUs of this kind; whether that could be written."""
    _trusted.cache_clear()
    return FILE.update({key_of(protocol, device): facts})


def forget(protocol: str, device: torch.device) -> None:
    """The opposite of `record`, for a protocol that failed."""
    _trusted.cache_clear()
    FILE.update({key_of(protocol, device): None})


def key_of(protocol: str, device: torch.device) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in versions_of(protocol).items())
    return f"{protocol} on {device_name(device)} ({arch_of(device)}) with {versions}"


def versions_of(protocol: str) -> dict[str, str]:
    """What a verification holds for: these kernels and, where it compiles them on the spot, this Triton."""
    packages = ["anl_kernels", "triton"] if protocol.startswith("triton") else ["anl_kernels"]
    return {name: importlib.import_module(name).__version__ for name in packages}


def device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "the host in place of a GPU"  # an emulation, or Triton's interpreter
    return torch.get_device_module(device).get_device_name(device)


def arch_of(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName
    return f"sm_{properties.major}{properties.minor}"
