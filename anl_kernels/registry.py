"""The backends by name, which of them can run here, and which one a call takes."""

from __future__ import annotations

import os
from typing import NamedTuple

from torch import Tensor

from .backends import cpu, reference
from .layout import log_once

# Fastest first; `auto` takes the first of the device's that can run.
_MODULES = {"cpu": cpu, "reference": reference}
_BY_DEVICE = {"cpu": ("cpu", "reference")}
_ANYWHERE = ("reference",)


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
    name = call.backend
    if name == "auto":
        name = os.environ.get("ANL_KERNELS_BACKEND", "auto")
    key = (name, logits.device.type)
    if key not in call.modules:
        call.modules[key] = _chosen(name, logits, call)
    return call.modules[key]


def _chosen(name: str, logits: Tensor, call):
    if name != "auto":
        module = _named(name)
        reason = _cannot_run(module, logits, call)
        if reason is not None:
            raise RuntimeError(f"backend={name!r} cannot run this call: {reason}")
        return module
    for name in _BY_DEVICE.get(logits.device.type, _ANYWHERE):
        module = _MODULES[name]
        reason = _cannot_run(module, logits, call)
        if reason is None:
            return module
        log_once(f"anl_kernels: the {name} backend is passed over: {reason}")
    return reference


def _cannot_run(module, logits: Tensor, call) -> str | None:
    return module.unavailable() or module.cannot_run(logits, call)


def _named(name: str):
    if name not in _MODULES:
        raise ValueError(f"there is no backend {name!r}; there are {', '.join(map(repr, _MODULES))} and 'auto'")
    return _MODULES[name]


def fused(name: str):
    """The fused backend `name`: for the operators, whose call has been checked."""
    return _MODULES[name]
