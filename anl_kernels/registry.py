"""The backends by name, which of them can run here, and which one a call takes."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import autograd
from .backends import LaunchRefused, cpu, cuda, reference, triton
from .layout import is_compiling, log_once

if TYPE_CHECKING:
    from .call import Call

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


def device_of(name: str) -> torch.device:
    """A device whose tensors the backend takes; of several GPUs the current one."""
    kind = getattr(_MODULES[name], "device_type", lambda: "cpu")()
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def is_interpreted(name: str) -> bool:
    """Whether the backend's kernels run under Triton's interpreter."""
    return name == "triton" and triton.interpreted()


class WithFallbacks:
    """A GPU backend as `auto` takes it: what it refuses to launch, the next one runs, and in the end the reference."""

    def __init__(self, name: str):
        names = ("cuda", "triton", "reference")
        self.NAME, self.modules = name, [_MODULES[n] for n in names[names.index(name) :]]

    def __getattr__(self, operation: str):
        if operation.startswith("_") or not hasattr(self.modules[0], operation):
            raise AttributeError(operation)
        return functools.partial(self._run, operation)

    def _run(self, operation: str, *arguments):
        refused = None
        for module in self.modules:
            if not hasattr(module, operation) or (refused and _why_not(module, arguments)):
                continue
            if refused:
                log_once(f"{refused}; the {module.NAME} backend runs it")
            try:
                return getattr(module, operation)(*arguments)
            except LaunchRefused as error:
                refused = error
        raise refused

    def robust_loss(self, logits: Tensor, target: Tensor, weight: Tensor | None, call) -> Tensor:
        try:
            return autograd.robust_loss(self, logits, target, weight, call)
        except LaunchRefused as refused:
            if reference.cannot_run(logits, call):
                raise
            log_once(f"{refused}; the reference backend runs it")
            return reference.robust_loss(logits, target, weight, call)


def _why_not(module, arguments) -> str | None:
    tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    call = None if isinstance(arguments[0], Tensor) else arguments[0]
    return module.unavailable() or (call and module.cannot_run(tensor, call))


_WITH_FALLBACKS = {name: WithFallbacks(name) for name in ("cuda", "triton")}


_chosen: dict[tuple[str, torch.device, bool], object] = {}  # the backends of earlier calls
_MANY = 1 << 31  # logits of which a row may have more classes than a backend takes


def choose(logits: Tensor, call: Call):
    """The backend that runs `call`; an explicit one that cannot raises with the reason."""
    name, asked_by = call.backend, "backend"
    if name == "auto":
        name, asked_by = os.environ.get("ANL_KERNELS_BACKEND") or "auto", "ANL_KERNELS_BACKEND"
    if is_compiling() or logits.numel() >= _MANY:  # a compiled graph would guard on what is cached
        return _first_that_can(logits, call) if name == "auto" else _named(name, asked_by, logits, call)
    key = name, logits.device, call.inplace
    found = _chosen.get(key)
    if found is None:
        found = _first_that_can(logits, call) if name == "auto" else _named(name, asked_by, logits, call)
        _chosen[key] = found
    return found


def choose_anew() -> None:
    """Forgets what earlier calls took: for tests, which change what can run."""
    _chosen.clear()


def check_name(name: str, asked_by: str) -> None:
    if name not in _MODULES:
        known = ", ".join(map(repr, _MODULES))
        raise ValueError(f"{asked_by}={name!r}: there is no such backend; there are {known} and 'auto'")


def _named(name: str, asked_by: str, logits: Tensor, call):
    check_name(name, asked_by)
    reason = _cannot_run(_MODULES[name], logits, call)
    if reason is not None:
        raise RuntimeError(f"{asked_by}={name!r} cannot run this call: {reason}")
    return _MODULES[name]


def _first_that_can(logits: Tensor, call):
    for name in FUSED_BY_DEVICE.get(logits.device.type, ()):
        reason = _cannot_run(_MODULES[name], logits, call)
        if reason is None:
            return fused(name, explicit=False)
        log_once(f"anl_kernels: the {name} backend is passed over: {reason}")
    reason = reference.cannot_run(logits, call)
    if reason is not None:
        log_once(f"anl_kernels: the reference backend runs a call all the same: {reason}")
    return reference


def _cannot_run(module, logits: Tensor, call) -> str | None:
    return module.unavailable() or module.cannot_run(logits, call)


def fused(name: str, explicit: bool):
    """The fused backend `name`; for a call that named none, with those that may take its place."""
    return _MODULES[name] if explicit else _WITH_FALLBACKS.get(name, _MODULES[name])
