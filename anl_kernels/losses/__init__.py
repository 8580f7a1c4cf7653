"""The losses: each a frozen term, the formula written once in `value`, and beside it the public function.

csrc/terms.h and triton_kernels/row_math.py hold the same formulas with their partial derivatives. A new loss is a class
and a function in one of the modules here, both named in its `__all__`.
"""

import torch

from ..terms import Expression, Factor, RowLoss, Term
from . import normalized, robust
from .normalized import *  # noqa: F403
from .robust import *  # noqa: F403

__all__ = sorted([*normalized.__all__, *robust.__all__])

_TERMS = [x for x in map(globals().get, __all__) if isinstance(x, type) and issubclass(x, Term)]
# In the order of TermKind in csrc/terms.h. A term without a kind runs as a RowLoss does.
BUILT_IN = tuple(sorted((term for term in _TERMS if term.kind is not None), key=lambda term: term.kind))

# What torch.load(weights_only=True) may make: terms hold numbers, and a RowLoss a function that has to be allowed too.
torch.serialization.add_safe_globals([*BUILT_IN, RowLoss, Expression, Factor])
torch.serialization.add_safe_globals([(term, f"anl_kernels.terms.{term.__name__}") for term in BUILT_IN])  # once there
