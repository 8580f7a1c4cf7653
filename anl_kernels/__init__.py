"""Losses for noisy labels in one pass over the logits: Active Negative Loss and its relatives.

>>> import anl_kernels as ak
>>> loss = ak.anl_ce(logits, target, alpha=5.0, beta=5.0)
>>> criterion = 5 * ak.NCE() + 5 * ak.RCE()
>>> loss = criterion(logits, target)
"""

from . import ops as _ops  # noqa: F401  defines the operators, so that a stored graph finds them
from .functional import (
    ael,
    agce,
    anl_ce,
    anl_fl,
    aul,
    cross_entropy,
    focal,
    gce,
    l1_penalty,
    mae,
    nce,
    nfl,
    nnce,
    nnfl,
    rce,
    robust_loss,
    sce,
)
from .linear import linear_anl_ce, linear_anl_fl, linear_robust_loss
from .modules import ANLCELoss, ANLFLLoss, RobustLoss
from .registry import backends
from .stats import Statistics
from .suggest import Suggestion, suggest
from .terms import AEL, AGCE, AUL, CE, FL, GCE, MAE, NCE, NFL, NNCE, NNFL, RCE, Expression, RowLoss

__version__ = "0.1.0"

__all__ = [
    "AEL",
    "AGCE",
    "AUL",
    "CE",
    "FL",
    "GCE",
    "MAE",
    "NCE",
    "NFL",
    "NNCE",
    "NNFL",
    "RCE",
    "ANLCELoss",
    "ANLFLLoss",
    "Expression",
    "RobustLoss",
    "RowLoss",
    "Statistics",
    "Suggestion",
    "ael",
    "agce",
    "anl_ce",
    "anl_fl",
    "aul",
    "backends",
    "cross_entropy",
    "focal",
    "gce",
    "l1_penalty",
    "linear_anl_ce",
    "linear_anl_fl",
    "linear_robust_loss",
    "mae",
    "nce",
    "nfl",
    "nnce",
    "nnfl",
    "rce",
    "robust_loss",
    "sce",
    "suggest",
]  # fmt: skip
