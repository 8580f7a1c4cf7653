"""The backends by name, which of them can run here, and which one a call takes."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import NAMES, Backend, FusedBackend, LaunchRefused, check_name, reference, triton
from .call import Call
from .layout import is_compiling, log_once

BACKENDS: dict[str, Backend] = {name: importlib.import_module(f".backends.{name}", __package__) for name in NAMES}
# What `auto` tries, in this order, before the reference.
FUSED_BY_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}


class BackendInfo(NamedTuple):
    name: str
    available: bool
    reason: str  # why not, or what it is for


def backends() -> list[BackendInfo]:
    """What can run here: a list of (name, available, reason), fastest first."""
    found = []
    for name, backend in BACKENDS.items():
        why_not = backend.unavailable()
        found.append(BackendInfo(name, why_not is None, why_not or backend.PURPOSE))
    return found


def device_of(name: str) -> torch.device:
    """A device whose tensors the backend takes; of several GPUs the current one."""
    kind = BACKENDS[name].device_type()
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def is_interpreted(name: str) -> bool:
    """Whether the backend's kernels run under Triton's interpreter."""
    return name == "triton" and triton.interpreted()


class WithFallbacks:
    """A GPU backend as `auto` takes it: what it refuses to launch, the next one runs, and in the end the reference."""

    def __init__(self, *fused: FusedBackend):
        self.NAME, self.PURPOSE, self.fused, self.all = fused[0].NAME, fused[0].PURPOSE, fused, (*fused, reference)

    def unavailable(self) -> str | None:
        return self.fused[0].unavailable()

    def cannot_run(self, logits: Tensor, call: Call) -> str | None:
        return self.fused[0].cannot_run(logits, call)

    def device_type(self) -> str:
        return self.fused[0].device_type()

    def row_loss(
        self,
        call: Call,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        grad: Tensor | None,
        coefs: Tensor | None,
    ) -> Tensor:
        return _first_that_launches(
            self.fused, lambda backend: backend.row_loss(call, logits, target, weight, grad, coefs), logits, call
        )

    def row_stats(self, call: Call, logits: Tensor, target: Tensor) -> Tensor:
        return _first_that_launches(self.fused, lambda b: b.row_stats(call, logits, target), logits, call)

    def slice_stats(self, call: Call, logits: Tensor, target: Tensor, lse: Tensor | None) -> Tensor:
        return _first_that_launches(self.all, lambda b: b.slice_stats(call, logits, target, lse), logits, call)

    def row_grad(
        self, call: Call, logits: Tensor, target: Tensor, coefs: Tensor, grad_output: Tensor | None, entropy
    ) -> Tensor:
        return _first_that_launches(
            self.all, lambda b: b.row_grad(call, logits, target, coefs, grad_output, entropy), logits, call
        )

    def column_sums(self, logits: Tensor, coefs: Tensor) -> Tensor:
        return _first_that_launches(self.all, lambda b: b.column_sums(logits, coefs), logits)

    def scaled(self, grad: Tensor, factor: Tensor, keep: bool) -> Tensor:
        return _first_that_launches(self.all, lambda b: b.scaled(grad, factor, keep), grad)


def _first_that_launches(
    backends: Sequence[Backend], run: Callable[[Backend], Tensor], logits: Tensor, call: Call | None = None
) -> Tensor:
    refused = None
    for backend in backends:
        if refused:
            if backend.unavailable() or (call and backend.cannot_run(logits, call)):
                continue
            log_once(f"{refused}; the {backend.NAME} backend runs it")
        try:
            return run(backend)
        except LaunchRefused as error:
            refused = error
    raise refused


_WITH_FALLBACKS = {
    "cuda": WithFallbacks(BACKENDS["cuda"], BACKENDS["triton"]),
    "triton": WithFallbacks(BACKENDS["triton"]),
}


def fused(name: str, explicit: bool) -> FusedBackend:
    """The fused backend `name`; for a call that named none, with those that may take its place."""
    return BACKENDS[name] if explicit else _WITH_FALLBACKS.get(name, BACKENDS[name])


_chosen: dict[tuple[str, torch.device, bool], Backend] = {}  # by earlier calls
_MANY = 1 << 31  # logits of which a row may have more classes than a backend takes


def choose(logits: Tensor, call: Call) -> Backend:
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


def _named(name: str, asked_by: str, logits: Tensor, call: Call) -> Backend:
    check_name(name, asked_by)
    reason = _cannot_run(BACKENDS[name], logits, call)
    if reason is not None:
        raise RuntimeError(f"{asked_by}={name!r} cannot run this call: {reason}")
    return BACKENDS[name]


def _first_that_can(logits: Tensor, call: Call) -> Backend:
    for name in FUSED_BY_DEVICE.get(logits.device.type, ()):
        reason = _cannot_run(BACKENDS[name], logits, call)
        if reason is None:
            return fused(name, explicit=False)
        log_once(f"anl_kernels: the {name} backend is passed over: {reason}")
    reason = reference.cannot_run(logits, call)
    if reason is not None:
        log_once(f"anl_kernels: the reference backend runs a call all the same: {reason}")
    return reference


def _cannot_run(backend: Backend, logits: Tensor, call: Call) -> str | None:
    return backend.unavailable() or backend.cannot_run(logits, call)
