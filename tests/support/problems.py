"""Logits and labels of every kind and layout, and the devices that they live on."""

import math
from functools import lru_cache, wraps

import oracle
import pytest
import torch
from devices import GPU


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


TOPS = (1.0, -1.0, 0.1, 300.0, -300.0, 2.0**-6)


def next_below(x):
    """The next smaller number of x's dtype, for x other than 0."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x.view(bits) - x.sign().to(bits)).view(x.dtype)


def near_ties(classes, dtype):
    """Logits and labels: of rows whose target is tied with the largest logit, and of rows where it is one ulp below.

    And which are tied.
    """
    top = torch.tensor(TOPS, dtype=torch.float64).to(dtype)
    values = (top.view(-1, 1).double() - 1 - torch.rand(len(TOPS), classes, generator=generator(0))).to(dtype)
    values, rows = values.repeat(2, 1), torch.arange(2 * len(TOPS))
    labels = torch.where(rows % 2 == 0, 1, classes - 2)  # before the top, and after it
    values[:, 4] = top.repeat(2)
    values[rows, labels] = torch.cat([top, next_below(top)])
    return values, labels, rows < len(TOPS)


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
