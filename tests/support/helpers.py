"""What the tests share: the losses under test, logits of every kind and layout, and the comparison with the oracle."""

import hashlib
import math
from functools import lru_cache, wraps
from typing import NamedTuple

import oracle
import pytest
import torch
from devices import GPU


def single(name, **parameters):
    return ((1.0, name, parameters),)


# name -> terms as the oracle takes them; `expression` turns them into the package's own.
EXPRESSIONS = {
    "ce": single("ce"),
    "nce": single("nce"),
    "nnce": single("nnce"),
    "fl": single("fl", gamma=0.5),
    "fl2": single("fl", gamma=2.0),
    "nfl": single("nfl", gamma=0.5),
    "nnfl": single("nnfl", gamma=0.5),
    "nnfl2": single("nnfl", gamma=2.0),
    "mae": single("mae"),
    "rce": single("rce", floor=1e-4),
    "gce": single("gce", q=0.7),
    "agce": single("agce", a=1.0, q=2.0),
    "aul": single("aul", a=5.5, q=3.0),
    "ael": single("ael", a=2.5),
    "sce": ((0.5, "ce", {}), (1.5, "rce", {"floor": 1e-3})),
    "anl_ce": ((1.0, "nce", {}), (1.0, "nnce", {})),
    "anl_fl": ((5.0, "nfl", {"gamma": 0.5}), (2.0, "nnfl", {"gamma": 0.5})),
    "nce+rce": ((1.0, "nce", {}), (0.5, "rce", {"floor": 1e-4})),
    "nce+mae": ((1.0, "nce", {}), (1.0, "mae", {})),
    "nfl+rce": ((1.0, "nfl", {"gamma": 0.5}), (1.0, "rce", {"floor": 1e-4})),
    "nfl+mae": ((1.0, "nfl", {"gamma": 0.5}), (1.0, "mae", {})),
    "nce+agce": ((1.0, "nce", {}), (4.0, "agce", {"a": 6.0, "q": 1.5})),
    "nce+aul": ((1.0, "nce", {}), (4.0, "aul", {"a": 6.3, "q": 1.5})),
    "nce+ael": ((1.0, "nce", {}), (4.0, "ael", {"a": 5.0})),
    "everything": (
        (0.1, "ce", {}),
        (1.0, "nce", {}),
        (2.0, "nnce", {}),
        (0.2, "fl", {"gamma": 0.7}),
        (1.5, "nfl", {"gamma": 0.7}),
        (0.5, "nnfl", {"gamma": 0.7}),
        (0.3, "mae", {}),
        (0.1, "rce", {"floor": 1e-4}),
        (0.4, "gce", {"q": 0.7}),
        (0.1, "agce", {"a": 1.0, "q": 2.0}),
        (0.05, "aul", {"a": 5.5, "q": 3.0}),
        (0.7, "ael", {"a": 2.5}),
    ),
}
# On awkward shapes three stand for all: every kind of statistic is in one of them.
REPRESENTATIVE = ("anl_ce", "anl_fl", "nce+rce")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EPS = {
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}  # half an ulp of 1


def dtype_id(value):
    return str(value).replace("torch.", "") if isinstance(value, torch.dtype) else None


def expression(terms):
    """The package's expression for the oracle's terms."""
    import anl_kernels as ak

    parts = [coefficient * getattr(ak, name.upper())(**parameters) for coefficient, name, parameters in terms]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def row_loss_expression(terms):
    """The same through RowLoss: every term's `value`, differentiated by autograd instead of by hand."""
    import anl_kernels as ak

    built = [(c, getattr(ak, name.upper())(**parameters)) for c, name, parameters in terms]
    gammas = {p["gamma"] for _, _, p in terms if "gamma" in p}
    return ak.RowLoss(lambda s: sum(c * term.value(s) for c, term in built), gamma=gammas.pop() if gammas else None)


def compile_counter():
    """A backend of torch.compile that counts its graphs; imported late, which takes more than a second."""
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend("aot_eager")


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ---- devices: problems are made on the CPU, so that their numbers are the same everywhere, and handed out on the
# default device; the oracle's side of a comparison is on the CPU


THERE = pytest.mark.usefixtures("on_device")  # for tests that call the package themselves, not by `calculate`


def handed_out(tensor):
    """A copy on the default device: where a GPU backend's tensors live, in a test that uses the fixture on_device."""
    return tensor.to(torch.get_default_device(), copy=True)


def handed_out_of(keywords):
    return {name: handed_out(x) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}


def _handed_out(factory):
    return lambda *size, **keywords: handed_out(factory(*size, device="cpu", **keywords))


# torch's own ask for a generator of the device that they make tensors on.
randn, rand, randint = _handed_out(torch.randn), _handed_out(torch.rand), _handed_out(torch.randint)


def on_cpu(function):
    """`function`, which takes tensors from anywhere and works on the CPU."""
    if GPU is None:  # there is nowhere else
        return function

    def here(value):
        return value.detach().cpu() if isinstance(value, torch.Tensor) else value

    @wraps(function)
    def run(*args, **keywords):
        with torch.device("cpu"):
            return function(*map(here, args), **{name: here(value) for name, value in keywords.items()})

    return run


# ---- values

ROW_KINDS = ("normal", "peaked", "wrong", "uniform", "high", "low", "narrow", "mixed", "wide", "masked")


def copied(function):
    """Makes it once and hands out copies, so that what is done to one harms no other test."""
    cached = lru_cache(maxsize=256)(on_cpu(function))
    return wraps(function)(lambda *args, **keywords: tuple(map(handed_out, cached(*args, **keywords))))


@copied
def rows_of_every_kind(classes, dtype, seed=0, kinds=ROW_KINDS, min_prob=1e-7):
    """(values (N, classes), labels (N,)): one row of each kind."""
    g = generator(1000 * classes + seed)
    rows, labels = [], []
    for kind in kinds:
        row = torch.randn(classes, generator=g, dtype=torch.float64)
        label = int(torch.randint(classes, (), generator=g))
        if kind == "peaked":
            row[label] = row.max() + 9
        elif kind == "wrong":
            row[(label + 1) % classes] = row.max() + 9
        elif kind == "uniform":
            row[:] = 0.25
        elif kind == "high":
            row += 1e4
        elif kind == "low":
            row -= 1e4
        elif kind == "narrow":  # wholly above the clamp
            row *= 0.3
        elif kind == "mixed":  # some classes above it, some below, whatever the number of classes
            row = torch.linspace(0, 30, classes, dtype=torch.float64)[torch.randperm(classes, generator=g)]
        elif kind == "wide":
            row *= 40
        elif kind == "masked" and classes > 2:
            gone = torch.rand(classes, generator=g) < 0.4
            gone[label] = gone[(label + 1) % classes] = False
            row[gone] = -math.inf
        rows.append(row)
        labels.append(label)
    values = torch.stack(rows).to(dtype)
    return away_from_clamp(values, min_prob), torch.tensor(labels)


@copied
def batch(classes, dtype):
    """24 rows: every kind twice, and four ignored rows (label -100) full of NaN."""
    parts = [rows_of_every_kind(classes, dtype, seed) for seed in (1, 2)]
    ignored = torch.full((2, classes), math.nan, dtype=dtype), torch.full((2,), -100)
    order = torch.randperm(24, generator=generator(classes))
    values = torch.cat([parts[0][0], ignored[0], parts[1][0], ignored[0]])[order]
    labels = torch.cat([parts[0][1], ignored[1], parts[1][1], ignored[1]])[order]
    return values, labels


def away_from_clamp(values, min_prob=1e-7):
    """Moves what lies within rounding of the clamp, where the gradient jumps, so that no rounding decides a test."""
    values = values.clone()
    for _ in range(20):
        log_p = values.double().log_softmax(1)
        near = (log_p + -math.log(min_prob)).abs() < 2e-3
        if not near.any():
            break
        values[near] -= (values[near].abs() * 0.01).clamp(min=0.5)
    return values


# ---- layouts: (values (N, K)) -> the same numbers, seen as a tensor of that layout; what lies outside the view is NaN


def _nan(shape, like):
    return torch.full(shape, math.nan, dtype=like.dtype, device=like.device)


def _padded(v, before, after):
    return _nan((v.shape[0], before + v.shape[1] + after), v)[:, before : before + v.shape[1]].copy_(v)


def _spatial(v, size):
    """(N, K) -> values (N / prod(size), K, *size)."""
    return v.view(-1, *size, v.shape[1]).movedim(-1, 1)


def _channels_last(v, size):
    x = _spatial(v, size)
    return x.contiguous(memory_format=torch.channels_last)


def _permuted(v, size):
    x = _spatial(v, size)  # (n, K, a, b) stored as (n, K, b, a): the trailing dimensions do not collapse
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def _hole(v, size):
    x = _spatial(v, size)
    return _nan((*x.shape[:-1], 2 * x.shape[-1]), x)[..., ::2].copy_(x)


LAYOUTS = {  # every one takes a multiple of 12 rows
    "rows": lambda v: v,
    "padded": lambda v: _padded(v, 0, 5),
    "offset": lambda v: _padded(v, 3, 2),
    "transposed": lambda v: v.t().contiguous().t(),
    "every_other_class": lambda v: _nan((v.shape[0], 2 * v.shape[1]), v)[:, ::2].copy_(v),
    "every_other_row": lambda v: _nan((2 * v.shape[0], v.shape[1]), v)[::2].copy_(v),
    "transposed_hole": lambda v: _nan((v.shape[1], 3 * v.shape[0]), v)[:, ::3].copy_(v.t()).t(),
    "spatial": lambda v: _spatial(v, (3, 2)).contiguous(),
    "spatial_1d": lambda v: _spatial(v, (12,)).contiguous(),
    "spatial_3d": lambda v: _spatial(v, (3, 2, 2)).contiguous(),
    "channels_last": lambda v: _channels_last(v, (3, 2)),
    "channels_last_hole": lambda v: _hole(v, (12,)),
    "spatial_permuted": lambda v: _permuted(v, (3, 2)),
    "spatial_hole": lambda v: _hole(v, (3, 2)),
    "spatial_inner_one": lambda v: _spatial(v, (1, 1)).contiguous(),
}


def lay_out(layout, values, labels):
    """(logits, target) of that layout; `values` (N, K), `labels` (N,)."""
    logits = LAYOUTS[layout](values.clone())
    target = labels.view(logits.shape[0], *logits.shape[2:])
    assert torch.equal(oracle.as_rows(logits).nan_to_num(), values.nan_to_num()), layout
    return logits, target


# ---- comparison with the oracle


def acc(dtype):
    """What a dtype is computed in, and the loss's own dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def calculate(logits, target, criterion, grad_output=None, leaf=True, **keywords):
    """(loss, gradient) of the package; leaf=False puts an alias between, for what may not be done to a leaf.

    Tensors go to the backend's device, in the layout they have, and the results come back to where the logits were.
    """
    import anl_kernels as ak

    where, device = logits.device, DEVICES.get(keywords.get("backend"), "cpu")
    logits = moved(logits.detach(), device).requires_grad_()
    keywords = {k: moved(v, device) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    given = logits if leaf else Alias.apply(logits)
    loss = ak.robust_loss(given, moved(target, device), criterion, **keywords)
    seed = torch.ones_like(loss) if grad_output is None else moved(grad_output, device)
    (grad,) = torch.autograd.grad(loss, logits, seed)
    assert grad.dtype == logits.dtype and grad.shape == logits.shape
    return loss.detach().to(where), grad.to(where)


# Where a backend's tensors live; without a GPU Triton's kernels are interpreted, and CUDA's compiled for the CPU.
DEVICES = dict.fromkeys(("cuda", "triton"), GPU or "cpu")


def moved(tensor, device):
    """The same view of a copy of the storage: strides, overlaps and what lies around it included."""
    if tensor.device.type == device:
        return tensor
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.as_strided((elements,), (1,), 0).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Alias(torch.autograd.Function):
    """The same storage as a non-leaf, as a linear layer's output would be: its memory may be overwritten."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


@on_cpu
def scales(grad, target):
    """What an element's error is measured by: the largest of its row, the target's and the others' apart."""
    rows = oracle.as_rows(grad.detach().double()).abs()
    labels = target.reshape(-1, 1).long().clamp(0, rows.shape[1] - 1)
    others = rows.scatter(1, labels, 0.0).amax(1, keepdim=True)
    all_ = rows.amax(1, keepdim=True)
    return others.expand_as(rows).scatter(1, labels, all_)


# How far the package may be from float64, row by row (test_accuracy asks for more, of many rows at once):
PLAIN_FACTOR = 3  # times plain PyTorch's own error in that row, one sample of what rounding does there,
ROUNDINGS = 16  # half ulps of what an element is measured by,
CANCELLED = 8  # and half ulps of the largest gradient the loss ever has: what is left where terms of that size cancel.
CANCELLED_MORE = 64  # of them in float64, whose sums no wider number takes, and in plain PyTorch


class Truth(NamedTuple):
    """The oracle's float64 loss and gradient, and how far off plain PyTorch is in the arithmetic of the package."""

    loss: torch.Tensor
    grad: torch.Tensor
    loss_error: torch.Tensor  # as loss
    grad_error: torch.Tensor  # (rows, 1): the largest of each row
    magnitude: torch.Tensor  # (rows, 1): how large the gradient of the row could have been
    ones: float  # how much of the loss is "1 - a ratio"
    dtype: torch.dtype  # of the arithmetic

    def of(self, rows):
        """Those rows of a loss without reduction."""
        return Truth(
            self.loss[rows],
            oracle.as_rows(self.grad)[rows],
            self.loss_error[rows],
            self.grad_error[rows],
            self.magnitude[rows],
            self.ones,
            self.dtype,
        )


def truth(logits, target, terms, **keywords):
    """Made once of the same numbers: every backend, and every way to a gradient, is compared with it."""
    problem = Problem(logits, target, terms, keywords)  # large ones are not kept: a thousand of them fill the memory
    return kept_truth(problem) if logits.numel() <= 100_000 else problem.solve()


class Problem:
    """The arguments of `truth`; two are equal if they hold the same numbers."""

    def __init__(self, logits, target, terms, keywords):
        self.given = {"logits": logits, "target": target, **keywords}
        self.terms = terms
        self.key = freeze(terms), tuple((name, content_of(value)) for name, value in sorted(self.given.items()))

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return self.key == other.key

    def solve(self):
        return calculate_truth(terms=self.terms, **self.given)


def content_of(value):
    if not isinstance(value, torch.Tensor):
        return value
    numbers = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return value.dtype, value.shape, hashlib.sha256(numbers).digest()


kept_truth = lru_cache(maxsize=1000)(Problem.solve)


@on_cpu
def calculate_truth(logits, target, terms, **keywords):
    """The error of float64 itself is that of float32, 2^29 times smaller; 64 times that, for chance."""
    exact_loss, exact_grad = oracle.loss_and_grad(logits, target, terms, **keywords)
    plain_loss, plain_grad = oracle.loss_and_grad(logits, target, terms, dtype=torch.float32, **keywords)
    digits = 2.0**-26 if logits.dtype == torch.float64 else 1.0
    grad_error = digits * oracle.as_rows((plain_grad.double() - exact_grad).abs()).amax(1, keepdim=True).nan_to_num(0)
    loss_error = digits * (plain_loss.double() - exact_loss).abs().nan_to_num(0)
    classes, factors = oracle.as_rows(logits).shape[1], row_factors(target, **keywords)
    magnitude = largest_gradient(freeze(terms), classes, keywords.get("min_prob", 1e-7)) * factors.view(-1, 1)
    if keywords.get("entropy_weight"):
        valid = (factors > 0).view(-1, 1)
        magnitude = magnitude + valid * abs(keywords["entropy_weight"]) * math.log(classes) / valid.sum().clamp(min=1)
    ones = sum(abs(coefficient) for coefficient, name, _ in terms if name in ("nnce", "nnfl"))
    ones *= 1.0 if keywords.get("reduction") == "none" else factors.sum().item()
    return Truth(exact_loss, exact_grad, loss_error, grad_error, magnitude, ones, acc(logits.dtype))


def freeze(terms):
    return tuple((coefficient, name, tuple(parameters.items())) for coefficient, name, parameters in terms)


@lru_cache(maxsize=4096)
def largest_gradient(frozen, classes, min_prob):
    """The largest derivative of a row's loss where it matters: nothing known yet, or the target tied with another."""
    z = torch.zeros(3, classes, dtype=torch.float64)
    z[1, :2] = math.log(classes)
    z[2, :2] = math.log(classes) + 3
    terms = tuple((coefficient, name, dict(parameters)) for coefficient, name, parameters in frozen)
    _, grad = oracle.loss_and_grad(z, torch.zeros(3, dtype=torch.int64), terms, reduction="sum", min_prob=min_prob)
    return grad.abs().max().item()


def row_factors(target, *, grad_output=None, weight=None, ignore_index=-100, reduction="mean", **others):
    """(N,): what the reduction multiplies each row's gradient by, without sign."""
    labels = target.reshape(-1).long()
    valid = labels != ignore_index
    factors = (
        torch.ones(len(labels), dtype=torch.float64)
        if weight is None
        else weight.double()[labels.where(valid, torch.tensor(0))]
    )
    factors = factors * valid
    if reduction == "mean" and valid.any():
        factors = factors / factors.sum()
    return (factors * (1.0 if grad_output is None else torch.as_tensor(grad_output).double())).abs()


@on_cpu
def assert_as_accurate(loss, grad, target, true, scaled=0.0):
    """loss and grad against float64; the margin is plain PyTorch's own error, and a few roundings.

    For half precision the arithmetic is float32's, and the gradient is rounded once: half an ulp. scaled: it was
    rounded before it was multiplied by that, and once more after.
    """
    assert loss.dtype == true.dtype
    check_loss(loss, true)
    check_grad(grad, target, true, scaled)


@on_cpu
def check_loss(loss, true):
    exact = true.loss
    assert loss.shape == exact.shape
    assert torch.equal(loss.isnan(), exact.isnan())
    relative = 1e-6 if true.dtype == torch.float32 else 1e-14
    largest = true.ones + (exact.nan_to_num(0).abs().max().item() if exact.numel() else 0.0)
    allowed = torch.maximum(relative * exact.abs(), PLAIN_FACTOR * true.loss_error) + 4 * EPS[true.dtype] * largest
    bad = ((loss.double() - exact).abs() > allowed) & ~exact.isnan()
    assert not bad.any(), f"loss {loss[bad].tolist()}, exact {exact[bad].tolist()}, allowed {allowed[bad].tolist()}"


@on_cpu
def check_grad(grad, target, true, scaled=0.0):
    exact, rows, dtype = oracle.as_rows(true.grad), oracle.as_rows(grad.double()), true.dtype
    assert torch.equal(rows.isnan().any(1), exact.isnan().any(1)), "NaN rows"
    scale = scales(exact, target)
    magnitude = true.magnitude + (scale.nan_to_num(0).max() if scale.numel() else 0.0)
    cancelled = CANCELLED_MORE if dtype == torch.float64 else CANCELLED
    allowed = PLAIN_FACTOR * true.grad_error + EPS[dtype] * (ROUNDINGS * scale + cancelled * magnitude)
    if grad.dtype != dtype:  # the rounding of the gradient itself, subnormals included
        smallest = torch.finfo(grad.dtype).smallest_normal * EPS[grad.dtype]
        once, again = (
            1.001 * (EPS[grad.dtype] * exact.abs() + smallest),
            EPS[grad.dtype] * exact.abs() + smallest * scaled,
        )
        allowed = allowed + (once + again if scaled else once)
        exact = exact.clamp(torch.finfo(grad.dtype).min, torch.finfo(grad.dtype).max)
    error = (rows - exact).abs()
    bad = error > allowed
    if bad.any():
        worst = (error / allowed.clamp(min=1e-300)).nan_to_num(0).argmax()
        row, k = divmod(int(worst), rows.shape[1])
        raise AssertionError(
            f"{int(bad.sum())} elements; worst: row {row}, class {k} (target {target.reshape(-1)[row]}): "
            f"{rows[row, k].item():.9g}, exact {exact[row, k].item():.9g}, "
            f"error {error[row, k].item():.3g}, allowed {allowed[row, k].item():.3g}"
        )


def check(logits, target, terms, criterion=None, scaled=0.0, **keywords):
    """Runs the package and compares; keywords go to both, save those that only the package knows."""
    ours = {k: keywords.pop(k) for k in ("backend", "recompute", "inplace") if k in keywords}
    true = truth(logits, target, terms, **keywords)
    result = calculate(logits, target, criterion or expression(terms), **ours, **keywords)
    assert_as_accurate(*result, target, true, scaled)
    return result
