"""The backends by name, which of them can run here, and which one a call takes."""

from __future__ import annotations

import os
from typing import NamedTuple

from torch import Tensor

from .backends import cpu, cuda, reference, triton
from .layout import log_once

_MODULES = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": reference}  # fastest first
# What `auto` tries, in this order, before the reference.
FUSED_BY_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}


class Backend(NamedTuple):
    name: str
    available: bool
    reason: str  # why not, or what it is for


def backends() -> list[Backend]:
    """What can run here: a list of (name, available, reason), fastest first."""
    found = []
    for name, module in _MODULES.items():
        why_not = module.unavailable()
        found.append(Backend(name, why_not is None, why_not or module.PURPOSE))
    return found


def choose(logits: Tensor, call):
    """The backend module that runs `call`; an explicit one that cannot raises with the reason."""
    name, asked_by = call.backend, "backend"
    if name == "auto":
        name, asked_by = os.environ.get("ANL_KERNELS_BACKEND") or "auto", "ANL_KERNELS_BACKEND"
    key = (name, logits.device.type)
    if key not in call.modules:
        call.modules[key] = _first_that_can(logits, call) if name == "auto" else _named(name, asked_by, logits, call)
    return call.modules[key]


def _named(name: str, asked_by: str, logits: Tensor, call):
    if name not in _MODULES:
        known = ", ".join(map(repr, _MODULES))
        raise ValueError(f"{asked_by}={name!r}: there is no such backend; there are {known} and 'auto'")
    reason = _cannot_run(_MODULES[name], logits, call)
    if reason is not None:
        raise RuntimeError(f"{asked_by}={name!r} cannot run this call: {reason}")
    return _MODULES[name]


def _first_that_can(logits: Tensor, call):
    for name in FUSED_BY_DEVICE.get(logits.device.type, ()):
        reason = _cannot_run(_MODULES[name], logits, call)
        if reason is None:
            return _MODULES[name]
        log_once(f"anl_kernels: the {name} backend is passed over: {reason}")
    reason = reference.cannot_run(logits, call)
    if reason is not None:
        log_once(f"anl_kernels: the reference backend runs a call all the same: {reason}")
    return reference


def _cannot_run(module, logits: Tensor, call) -> str | None:
    return module.unavailable() or module.cannot_run(logits, call)


def fused(name: str):
    """The fused backend `name`: for the operators, whose call has been checked."""
    return _MODULES[name]
