"""What the public functions of losses are made with."""

from __future__ import annotations

import inspect

from torch import Tensor

from ..functional import cached, robust_loss
from ..terms import Expression, as_factor

_SHARED_KEYWORDS = """

    Args:
        logits: (N, K), (K,) or (N, K, d1, ...), float16, bfloat16, float32 or float64.
        target: (N,), () or (N, d1, ...), class indices.
        weight, ignore_index, reduction, entropy_weight, min_prob, inplace, recompute, backend, class_group,
            batch_group, input: the keywords of `robust_loss`, whose documentation has shapes, results and errors."""


def loss_function(function):
    """Documents the keywords that `function` hands on to robust_loss. Its logits may come as `input`."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = [p for p in inspect.signature(robust_loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    function.__signature__ = inspect.Signature(own + shared, return_annotation=Tensor)
    function.__doc__ = function.__doc__.rstrip() + _SHARED_KEYWORDS
    function.__defaults__ = (None, None)
    return function


@cached
def one(term_class, *parameters) -> Expression:
    return Expression(term_class(*parameters).terms_of())


@cached
def pair(alpha, first, beta, second, *parameters) -> Expression:
    """alpha and beta times two terms of these classes, both with the same parameters."""
    alpha, beta = as_factor("alpha", alpha), as_factor("beta", beta)
    return Expression(((alpha, first(*parameters)), (beta, second(*parameters))))


@cached
def unlike(alpha, first, beta, second, of_second, *of_first) -> Expression:
    """alpha and beta times two terms of these classes, each with parameters of its own."""
    alpha, beta = as_factor("alpha", alpha), as_factor("beta", beta)
    return Expression(((alpha, first(*of_first)), (beta, second(of_second))))
