"""The losses as nn.Modules."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import robust_loss
from .terms import NCE, NFL, NNCE, NNFL, Algebra


class RobustLoss(nn.Module):
    """Any loss of the package as a module, like nn.CrossEntropyLoss.

    Args:
        expression: a term or a weighted sum of terms, e.g. `5 * NCE() + 5 * RCE()`.
        weight: (K,), kept as a buffer; or None.
        options: the other keywords of `robust_loss`.

    Called with logits (N, K), (K,) or (N, K, d1, ...) and targets (N,), () or (N, d1, ...); returns as `robust_loss`.
    """

    def __init__(self, expression: Algebra, *, weight: Tensor | None = None, **options):
        super().__init__()
        if not isinstance(expression, Algebra):
            raise TypeError(f"expression must be a loss such as 5 * NCE() + NNCE(), got {type(expression).__name__}")
        for name in options:
            if name not in robust_loss.__kwdefaults__:
                raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {name!r}")
        self.expression = 1.0 * expression
        self.options = options
        self.register_buffer("weight", weight)
        parts = [term.f for _, term in self.expression.terms if isinstance(getattr(term, "f", None), nn.Module)]
        if parts:  # a RowLoss of a module: its parameters are this module's
            self.functions = nn.ModuleList(parts)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return robust_loss(logits, target, self.expression, weight=self.weight, **self.options)

    def extra_repr(self) -> str:
        return ", ".join([repr(self.expression), *(f"{name}={value!r}" for name, value in self.options.items())])


class ANLCELoss(RobustLoss):
    """Active negative loss on cross entropy, alpha NCE + beta NNCE: `anl_ce` as a module. Ye et al., NeurIPS 2023."""

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, **options):
        super().__init__(alpha * NCE() + beta * NNCE(), **options)


class ANLFLLoss(RobustLoss):
    """Active negative loss on the focal loss, alpha NFL + beta NNFL: `anl_fl` as a module. Ye et al., NeurIPS 2023."""

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, gamma: float = 0.5, **options):
        super().__init__(alpha * NFL(gamma) + beta * NNFL(gamma), **options)
