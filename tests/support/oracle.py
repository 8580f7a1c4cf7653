"""The papers' losses, written literally in plain PyTorch; shares nothing with the package it judges.

A loss here is a sum of terms, `((coefficient, name, parameters), ...)`, computed row by row as its paper states it, in
the dtype of the logits: float64 is the truth, and the same text in float32 is "plain PyTorch", whose error the kernels
must not exceed. Gradients come from autograd. `exact` repeats the formulas in mpmath, for rows where float64 itself
cancels (p_y -> 1).
"""

import math

import mpmath
import torch
import torch.nn.functional as F


def take(x, y):
    return x.gather(1, y.view(-1, 1)).squeeze(1)


def one_hot(y, classes, dtype):
    return F.one_hot(y, classes).to(dtype)


def ce(z, y, min_prob):
    return -take(F.log_softmax(z, 1), y)


def nce(z, y, min_prob):
    log_p = F.log_softmax(z, 1)
    return -take(log_p, y) / -log_p.sum(1)


def nnce(z, y, min_prob):
    """Ye et al. 2023: p clamped to [min_prob, 1], negative learning by log(min_prob) - log p, normalized."""
    p = F.softmax(z, 1).clamp(min=min_prob, max=1)
    term = math.log(min_prob) - p.log()
    return 1 - take(term, y) / term.sum(1)


def focal_terms(z, gamma):
    """(1 - p)^gamma log p, the weight detached as in the authors' code."""
    log_p = F.log_softmax(z, 1)
    return (1 - log_p.detach().exp()) ** gamma * log_p


def fl(z, y, min_prob, gamma=0.5):
    return -take(focal_terms(z, gamma), y)


def nfl(z, y, min_prob, gamma=0.5):
    terms = focal_terms(z, gamma)
    return -take(terms, y) / -terms.sum(1)


def nnfl(z, y, min_prob, gamma=0.5):
    log_p = F.log_softmax(z, 1).clamp(min=math.log(min_prob))
    height = -((1 - min_prob) ** gamma) * math.log(min_prob)
    terms = height + (1 - log_p.detach().exp()) ** gamma * log_p
    return 1 - take(terms, y) / terms.sum(1)


def mae(z, y, min_prob):
    return 1 - take(F.softmax(z, 1), y)


def rce(z, y, min_prob, floor=1e-4):
    """Wang et al. 2019: -sum_k p_k log(one_hot_k), both clamped."""
    p = F.softmax(z, 1).clamp(min=min_prob, max=1)
    return -(p * one_hot(y, z.shape[1], z.dtype).clamp(min=floor, max=1).log()).sum(1)


def gce(z, y, min_prob, q=0.7):
    return (1 - take(F.softmax(z, 1), y) ** q) / q


def agce(z, y, min_prob, a=1.0, q=2.0):
    return ((a + 1) ** q - (a + take(F.softmax(z, 1), y)) ** q) / q


def aul(z, y, min_prob, a=5.5, q=3.0):
    return ((a - take(F.softmax(z, 1), y)) ** q - (a - 1) ** q) / q


def ael(z, y, min_prob, a=2.5):
    return torch.exp(-take(F.softmax(z, 1), y) / a)


def mse(z, y, min_prob):
    """Brier 1950, the sum over the classes."""
    return (F.softmax(z, 1) - one_hot(y, z.shape[1], z.dtype)).square().sum(1)


def amse(z, y, min_prob, a=30.0):
    """Wang et al. 2025: the mean over the classes, the label's one being a."""
    return (F.softmax(z, 1) - a * one_hot(y, z.shape[1], z.dtype)).square().mean(1)


def eps_ce(z, y, min_prob, m=1e5):
    """Wang et al. 2024: m is added to the p of the top, and all are divided by their sum. A tied target is the top.

    (p + m) / (1 + m) is written as 1 + (p - 1) / (1 + m): with a large m it is so near 1 that its log would cancel.
    """
    top = take(z, y) == z.amax(1)
    of_top = -torch.log1p((take(F.softmax(z, 1), y) - 1) / (1 + m))
    return torch.where(top, of_top, ce(z, y, min_prob) + math.log(1 + m))


TERMS = {f.__name__: f for f in (ce, nce, nnce, fl, nfl, nnfl, mae, rce, gce, agce, aul, ael, mse, amse, eps_ce)}


def sum_of_terms(z, y, terms, min_prob):
    return sum(coefficient * TERMS[name](z, y, min_prob, **parameters) for coefficient, name, parameters in terms)


def row_losses(z, y, terms, min_prob=1e-7):
    """z (N, K), y (N,) valid labels. A class at -inf does not exist: such a row is computed over those that do."""
    masked = (z.detach() == -math.inf).any(1)
    if not masked.any():
        return sum_of_terms(z, y, terms, min_prob)
    rows = {}
    whole = (~masked).nonzero().flatten()
    if len(whole):
        rows.update(zip(whole.tolist(), sum_of_terms(z[whole], y[whole], terms, min_prob)))
    for i in masked.nonzero().flatten().tolist():
        exists = z[i].detach() != -math.inf
        if exists[y[i]]:
            label = exists[: y[i]].sum().view(1)
            rows[i] = sum_of_terms(z[i][exists].view(1, -1), label, terms, min_prob).view(())
        else:
            rows[i] = (z[i, y[i]].detach() * 0).view(())  # the target itself does not exist: NaN
    return torch.stack([rows[i] for i in range(len(z))])


def batch_entropy(z):
    """log K - H(q), q the mean prediction over the rows of z; a class nobody predicts adds 0."""
    q = F.softmax(z, 1).mean(0)
    return math.log(z.shape[1]) + torch.where(q > 0, q * torch.where(q > 0, q, 1.0).log(), 0.0).sum()


def as_rows(z):
    """(K,), (N, K) or (N, K, d1, ...) -> (rows, K)."""
    if z.dim() == 1:
        return z.view(1, -1)
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def loss(z, y, terms, *, weight=None, ignore_index=-100, reduction="mean", entropy_weight=0.0, min_prob=1e-7):
    """The whole loss: z as cross_entropy takes it, y integer labels of the shape that is left without the classes."""
    rows, labels = as_rows(z), y.reshape(-1).long()
    valid = labels != ignore_index
    kept = row_losses(rows[valid], labels[valid], terms, min_prob) if valid.any() else rows.new_zeros(0)
    weights = torch.ones_like(kept) if weight is None else weight.to(rows.dtype)[labels[valid]]
    kept = kept * weights
    if reduction == "none":
        return rows.new_zeros(len(rows)).masked_scatter(valid, kept).view(y.shape)
    total = kept.sum() / weights.sum() if reduction == "mean" else kept.sum()
    if entropy_weight:
        if valid.any():
            total = total + entropy_weight * batch_entropy(rows[valid])
    return total


def loss_and_grad(z, y, terms, dtype=torch.float64, grad_output=None, **keywords):
    """Loss and gradient by autograd, computed in `dtype` from the given logits."""
    z = z.detach().to(dtype).requires_grad_()
    value = loss(z, y, terms, **keywords)
    seed = torch.ones_like(value) if grad_output is None else torch.as_tensor(grad_output).to(dtype).expand_as(value)
    (grad,) = torch.autograd.grad(value, z, seed, allow_unused=True)
    return value.detach(), torch.zeros_like(z) if grad is None else grad.detach()


# ---- the same formulas with as many digits as wanted

DIGITS = 120


def _exact_value(terms, z, z_fixed, y, min_prob):
    """The loss of one row; focal weights are taken at z_fixed, because they are detached."""
    mp = mpmath.mp
    p = softmax(z)
    p_fixed = softmax(z_fixed)
    log_p = [mp.log(x) for x in p]
    floor = mp.mpf(min_prob)
    clamped = [max(x, floor) for x in p]
    others = [k for k in range(len(z)) if k != y]

    def focal(gamma):
        return [(1 - x) ** mp.mpf(gamma) for x in p_fixed]

    def value(name, gamma=0.5, floor_=1e-4, q=None, a=None, m=None, **rest):
        floor_ = rest.get("floor", floor_)
        if name == "ce":
            return -log_p[y]
        if name == "nce":
            return log_p[y] / mp.fsum(log_p)
        if name == "nnce":
            heights = [mp.log(x / floor) for x in clamped]
            return mp.fsum(heights[k] for k in others) / mp.fsum(heights)
        if name in ("fl", "nfl"):
            w = focal(gamma)
            top = -w[y] * log_p[y]
            return top if name == "fl" else top / mp.fsum(-w[k] * log_p[k] for k in range(len(z)))
        if name == "nnfl":
            w = focal(gamma)
            height = -((1 - floor) ** mp.mpf(gamma)) * mp.log(floor)
            heights = [height + w[k] * log_p[k] if p[k] > floor else mp.mpf(0) for k in range(len(z))]
            return mp.fsum(heights[k] for k in others) / mp.fsum(heights)
        if name == "mae":
            return 1 - p[y]
        if name == "rce":
            return -mp.log(mp.mpf(floor_)) * mp.fsum(clamped[k] for k in others)
        if name == "gce":
            q = mp.mpf(0.7 if q is None else q)
            return (1 - p[y] ** q) / q
        if name == "agce":
            a, q = mp.mpf(1 if a is None else a), mp.mpf(2 if q is None else q)
            return ((a + 1) ** q - (a + p[y]) ** q) / q
        if name == "aul":
            a, q = mp.mpf(5.5 if a is None else a), mp.mpf(3 if q is None else q)
            return ((a - p[y]) ** q - (a - 1) ** q) / q
        if name == "ael":
            return mp.exp(-p[y] / mp.mpf(2.5 if a is None else a))
        if name in ("mse", "amse"):
            hot = mp.mpf(1 if name == "mse" else 30 if a is None else a)
            squares = mp.fsum((p[k] - (hot if k == y else 0)) ** 2 for k in range(len(z)))
            return squares if name == "mse" else squares / len(z)
        if name == "eps_ce":
            m = mp.mpf(1e5 if m is None else m)
            top = z_fixed[y] == max(z_fixed)  # not of the moved logits: which class is the top is held constant
            return -mp.log((p[y] + m * top) / (1 + m))
        raise KeyError(name)

    return mp.fsum(mp.mpf(coefficient) * value(name, **parameters) for coefficient, name, parameters in terms)


def softmax(z):
    top = max(z)
    e = [mpmath.exp(x - top) for x in z]
    total = mpmath.fsum(e)
    return [x / total for x in e]


def exact(z, y, terms, min_prob=1e-7):
    """One row: z a list of floats.  Loss and gradient (central differences, 120 digits) as floats."""
    with mpmath.workdps(DIGITS):
        point = [mpmath.mpf(x) for x in z]
        step = mpmath.mpf(10) ** -40

        def at(k, shift):
            moved = [x + shift if j == k else x for j, x in enumerate(point)]
            return _exact_value(terms, moved, point, y, min_prob)

        value = _exact_value(terms, point, point, y, min_prob)
        grad = [(at(k, step) - at(k, -step)) / (2 * step) for k in range(len(z))]
        return float(value), [float(g) for g in grad]
