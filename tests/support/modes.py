"""How a call is made: its reduction, and the way to its gradient; and a call compared in a mode."""

import math
from functools import lru_cache

import helpers
import oracle
import torch
from helpers import EXPRESSIONS


@lru_cache(maxsize=64)
def row_weights(rows):
    return torch.rand(rows, generator=helpers.generator(rows)) * 4 - 2


# mode -> (keywords for package and oracle, keywords for the package alone)
MODES = {
    "forward": (dict(reduction="mean"), dict(recompute=False)),
    "recompute": (dict(reduction="sum"), dict(recompute=True)),
    "none": (dict(reduction="none"), dict()),
    "row_loss": (dict(reduction="mean"), dict()),
    "inplace": (dict(reduction="sum"), dict(inplace=True)),  # not on the reference, which keeps the logits
    "entropy": (dict(reduction="mean", entropy_weight=0.7), dict()),
}


def modes(backend):
    if backend.interpreted and backend.variant:  # one of each pass: gradient, coefficients, statistics
        return ["inplace", "recompute", "row_loss"]
    return [mode for mode in MODES if backend.fused or mode != "inplace"]


def shared_keywords(mode, rows):
    keywords = dict(MODES[mode][0])
    if mode == "none":
        keywords["grad_output"] = row_weights(rows)
    return keywords


def run(logits, target, name, mode, backend):
    """The package on one tensor; loss and gradient as rows."""
    terms = EXPRESSIONS[name]
    criterion = helpers.row_loss_expression(terms) if mode == "row_loss" else helpers.expression(terms)
    keywords = {**shared_keywords(mode, target.numel()), **MODES[mode][1], "backend": backend.name}
    if mode == "none":
        keywords["grad_output"] = keywords["grad_output"].to(helpers.acc(logits.dtype)).view(target.shape)
    if mode == "inplace":
        keywords["leaf"] = False
    loss, grad = helpers.calculate(logits, target, criterion, **keywords)
    return loss.reshape(-1) if loss.dim() else loss, oracle.as_rows(grad)


def compare_batch(classes, dtype, name, mode, backend, layout="rows"):
    values, labels = helpers.batch(classes, dtype)
    logits, target = helpers.lay_out(layout, values, labels)
    loss, grad = run(logits, target, name, mode, backend)
    true = helpers.truth(values, labels, EXPRESSIONS[name], **shared_keywords(mode, len(labels)))
    helpers.assert_as_accurate(loss, grad, labels, true)
    assert (grad[labels == -100] == 0).all()
    assert (grad[values == -math.inf] == 0).all()
