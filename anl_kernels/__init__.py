"""Losses for noisy labels in one pass over the logits: Active Negative Loss and its relatives.

>>> import anl_kernels as ak
>>> loss = ak.anl_ce(logits, target, alpha=5.0, beta=5.0)
>>> criterion = 5 * ak.NCE() + 5 * ak.RCE()
>>> loss = criterion(logits, target)
"""

from . import losses as _losses
from . import ops as _ops  # noqa: F401  defines the operators, so that a stored graph finds them
from .functional import l1_penalty, robust_loss
from .linear import linear_anl_ce, linear_anl_fl, linear_robust_loss
from .losses import *  # noqa: F403
from .modules import ANLCELoss, ANLFLLoss, RobustLoss
from .registry import backends
from .statistics import Statistics
from .suggest import Suggestion, suggest
from .terms import Expression, RowLoss

__version__ = "0.1.0"

__all__ = [
    *_losses.__all__,
    "ANLCELoss",
    "ANLFLLoss",
    "Expression",
    "RobustLoss",
    "RowLoss",
    "Statistics",
    "Suggestion",
    "backends",
    "l1_penalty",
    "linear_anl_ce",
    "linear_anl_fl",
    "linear_robust_loss",
    "robust_loss",
    "suggest",
]
