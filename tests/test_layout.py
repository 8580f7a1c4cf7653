"""Layouts by themselves: what is seen without a copy, and the one case that is copied and logged."""

import logging
import math

import helpers
import pytest
import torch
from helpers import EXPRESSIONS

import anl_kernels as ak
from anl_kernels import layout


@pytest.mark.parametrize("name", helpers.LAYOUTS)
@pytest.mark.unpoisoned
def test_the_gradient_has_the_order_of_the_logits(one_fused, name):
    """empty_like: dense layouts keep their strides (channels-last stays channels-last), holes are closed."""
    values, labels = helpers.batch(10, torch.float32)
    logits, target = helpers.lay_out(name, values, labels)
    _, grad = helpers.calculate(logits, target, ak.NCE(), backend=one_fused.name)
    if name != "spatial_permuted":
        assert grad.stride() == torch.empty_like(logits).stride()


def test_a_copy_is_logged_once(one_fused, caplog, monkeypatch):
    monkeypatch.setattr(layout, "_said", set())
    values, labels = helpers.batch(10, torch.float32)
    logits, target = helpers.lay_out("spatial_permuted", values, labels)
    with caplog.at_level(logging.DEBUG, logger="anl_kernels"):
        for _ in range(3):
            helpers.calculate(logits, target, ak.NCE(), backend=one_fused.name)
    assert len([r for r in caplog.records if "cop" in r.getMessage()]) == 1


@pytest.mark.parametrize("name", [name for name in helpers.LAYOUTS if name != "spatial_permuted"])
def test_no_other_layout_is_copied(one_fused, caplog, monkeypatch, name):
    monkeypatch.setattr(layout, "_said", set())
    values, labels = helpers.batch(10, torch.float32)
    logits, target = helpers.lay_out(name, values, labels)
    with caplog.at_level(logging.DEBUG, logger="anl_kernels"):
        helpers.calculate(logits, target, ak.NCE(), backend=one_fused.name)
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [28, 56, 301])
def test_rows_that_begin_anywhere(backend, classes, dtype):
    """Within 16 bytes, with a gap after each; huge logits and masked classes stand at their edges."""
    values, labels = helpers.rows_of_every_kind(classes, dtype)
    values, labels = values.cpu().clone(), labels.cpu().clamp(max=classes - 4)
    values[1::3, -1] = -math.inf
    values[2::3, -2] = 300.0
    values[::4, 0] = 300.0
    room = torch.full((3 + len(values) * (classes + 1),), math.nan, dtype=dtype, device="cpu")
    logits = room[3:].view(-1, classes + 1)[:, :classes].copy_(values)
    helpers.check(logits, labels, EXPRESSIONS["anl_ce"], backend=backend.name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("classes", "gap"), [(3, 0), (10, 1), (16, 0)])
def test_many_rows_of_few_classes(backend, classes, gap, dtype):
    """More than CUDA takes at a time, in batches that come as one; the last is not whole, and one row is ignored."""
    values, labels = helpers.rows_of_every_kind(classes, dtype)
    times = 17_000 // len(values)
    room = torch.full((len(values) * times, classes + gap), math.nan, dtype=dtype, device="cpu")
    logits = room[:, :classes].copy_(values.cpu().repeat(times, 1))
    target = labels.cpu().repeat(times)
    target[len(target) // 2] = -100
    logits[len(target) // 2] = math.nan
    helpers.check(logits, target, EXPRESSIONS["anl_ce"], backend=backend.name)
    for name in ("anl_ce", "anl_fl"):
        helpers.check(logits[-200:], target[-200:], EXPRESSIONS[name], backend=backend.name, recompute=True)
