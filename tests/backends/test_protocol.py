"""Every backend has what `Backend` says, with the same signatures: static types are not checked in CI."""

import inspect

import pytest

from anl_kernels import registry
from anl_kernels.backends import NAMES, Backend, FusedBackend

FUSED = [name for name in NAMES if name != "reference"]
WHOLE = {name: registry.BACKENDS[name] for name in FUSED} | {
    f"{name}, auto": registry.fused(name, explicit=False) for name in FUSED
}


def methods_of(protocol):
    return {name: f for name, f in vars(protocol).items() if inspect.isfunction(f) and not name.startswith("_")}


def signature_of(method):
    signature = inspect.signature(method)
    return signature.replace(parameters=[p for p in signature.parameters.values() if p.name != "self"])


def check(backend, protocol):
    for name, method in methods_of(protocol).items():
        assert signature_of(getattr(backend, name)) == signature_of(method), name
        assert method.__doc__, name


@pytest.mark.parametrize("name", NAMES)
def test_every_backend_has_the_protocols_signatures(name):
    backend = registry.BACKENDS[name]
    check(backend, Backend)
    assert backend.NAME == name and backend.PURPOSE


@pytest.mark.parametrize("backend", WHOLE.values(), ids=WHOLE)
def test_every_fused_backend_takes_whole_rows(backend):
    check(backend, Backend)
    check(backend, FusedBackend)
    assert isinstance(backend, FusedBackend)


def test_the_reference_takes_none():
    assert not isinstance(registry.BACKENDS["reference"], FusedBackend)
