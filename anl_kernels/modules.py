"""The losses as nn.Modules."""

from __future__ import annotations

from torch import Tensor, nn

from .call import checked_call
from .functional import robust_loss
from .losses import NCE, NFL, NNCE, NNFL
from .losses.functions import pair
from .terms import Algebra, Expression, Factor, as_factor

# The keywords of robust_loss that are attributes, with their defaults, in the order of checked_call.
OPTIONS = {name: default for name, default in robust_loss.__kwdefaults__.items() if name not in ("weight", "input")}


class RobustLoss(nn.Module):
    """Any loss of the package as a module, like nn.CrossEntropyLoss.

    Args:
        expression: a term or a weighted sum of terms, e.g. `5 * NCE() + 5 * RCE()`.
        weight: (K,), kept as a buffer; or None.
        options: the other keywords of `robust_loss`.

    All of them are attributes, and what is assigned to one holds from the next call on. Parameters in `expression`
    (factors, or those of a RowLoss that is a module) are this module's.

    Called with logits (N, K), (K,) or (N, K, d1, ...) and targets (N,), () or (N, d1, ...); returns as `robust_loss`.

    Raises: as `robust_loss`; for a wrong argument when the module is made.
    """

    def __init__(self, expression: Algebra, *, weight: Tensor | None = None, **options):
        super().__init__()
        self._set_options(weight, options)
        self.expression = expression
        self._check()

    def _set_options(self, weight: Tensor | None, options: dict) -> None:
        for name in options:
            if name not in OPTIONS:
                raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {name!r}")
        if weight is not None and not (isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 1):
            raise TypeError("weight must be a floating point tensor (K,), one number per class")
        for name, default in OPTIONS.items():
            setattr(self, name, options.get(name, default))
        self.register_buffer("weight", weight)

    def _check(self) -> None:
        checked_call(self.expression, *(getattr(self, name) for name in OPTIONS))

    @property
    def expression(self) -> Expression:
        return self._expression

    @expression.setter
    def expression(self, expression: Algebra) -> None:
        if not isinstance(expression, Algebra):
            raise TypeError(f"expression must be a loss such as 5 * NCE() + NNCE(), got {type(expression).__name__}")
        self._expression = expression = 1.0 * expression
        functions = [term.f for _, term in expression.terms if isinstance(getattr(term, "f", None), nn.Module)]
        factors = [factor for factor, _ in expression.terms if isinstance(factor, Factor)]
        learned = {id(t): t for f in factors for t in (*f.tensors, *f.divisors) if isinstance(t, nn.Parameter)}
        for name, parts in (("functions", nn.ModuleList(functions)), ("factors", nn.ParameterList(learned.values()))):
            self._modules.pop(name, None)
            if len(parts):
                setattr(self, name, parts)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return robust_loss(
            logits,
            target,
            self.expression,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            entropy_weight=self.entropy_weight,
            min_prob=self.min_prob,
            inplace=self.inplace,
            recompute=self.recompute,
            backend=self.backend,
            class_group=self.class_group,
            batch_group=self.batch_group,
        )

    def extra_repr(self) -> str:
        weight = [] if self.weight is None else [f"weight=({len(self.weight)},)"]
        changed = [f"{name}={getattr(self, name)!r}" for name in OPTIONS if getattr(self, name) != OPTIONS[name]]
        return ", ".join([repr(self.expression), *weight, *changed])


class _Pair(RobustLoss):
    """alpha and beta times two terms, as attributes."""

    def __init__(self, options: dict, **parameters):
        nn.Module.__init__(self)
        for name, value in parameters.items():
            setattr(self, name, value)
        self._set_options(options.pop("weight", None), options)
        self._check()

    def __setattr__(self, name, value):
        if name in ("alpha", "beta"):
            checked = as_factor(name, value)
            if not isinstance(value, Tensor):
                value = checked  # a float: torch.compile makes a constant of a module's int
        elif name == "gamma":
            value = NFL(value).gamma
        super().__setattr__(name, value)


class ANLCELoss(_Pair):
    """Active negative loss on cross entropy, alpha NCE + beta NNCE: `anl_ce` as a module. Ye et al., NeurIPS 2023.

    Args:
        alpha, beta: numbers, or tensors with one element, which are learned if they are an nn.Parameter. They are
            attributes, as the options are: what is assigned to one holds from the next call on.
        options: those of `RobustLoss`.
    """

    def __init__(self, alpha: float | Tensor = 1.0, beta: float | Tensor = 1.0, **options):
        super().__init__(options, alpha=alpha, beta=beta)

    @property
    def expression(self) -> Expression:
        return pair(self.alpha, NCE, self.beta, NNCE)


class ANLFLLoss(_Pair):
    """Active negative loss on the focal loss, alpha NFL + beta NNFL: `anl_fl` as a module. Ye et al., NeurIPS 2023.

    Args:
        alpha, beta, options: those of `ANLCELoss`.
        gamma: the exponent of the focal weights, a number; an attribute too.
    """

    def __init__(self, alpha: float | Tensor = 1.0, beta: float | Tensor = 1.0, gamma: float = 0.5, **options):
        super().__init__(options, alpha=alpha, beta=beta, gamma=gamma)

    @property
    def expression(self) -> Expression:
        return pair(self.alpha, NFL, self.beta, NNFL, self.gamma)
