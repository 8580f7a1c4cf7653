"""Layouts by themselves: what is seen without a copy, and the one case that is copied and logged."""

import logging

import helpers
import pytest
import torch

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
