"""Random calls of a `_cpu` built with AddressSanitizer and UBSan: `python sanitized_calls.py FOLDER ISA N`.

Every tensor has the exact size the kernels are told: one element too many is an error. Run by test_sanitizers.py.
"""

import random
import sys

sys.path.insert(0, sys.argv[1])

import _cpu
import torch

NUM_KINDS, ANY_NEEDS, NUM_STATS, NUM_COEFS = 14, 31, 15, 11  # of csrc/terms.h and csrc/row_math.h
CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
CLASSES = [2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 2047, 2048, 2049, 4097, 150001]
LAYOUTS = ("rows", "padded", "transposed", "spatial", "channels_last", "strided")


def lay_out(values, layout, dtype):
    n, classes = values.shape
    if layout == "padded":
        return torch.empty(n, classes + random.choice([1, 5]), dtype=dtype)[:, :classes].copy_(values)
    if layout == "strided":
        return torch.empty(n, 2 * classes, dtype=dtype)[:, : 2 * classes - 1 : 2].copy_(values)
    if layout == "transposed":
        return values.to(dtype).t().contiguous().t()
    if layout == "rows":
        return values.to(dtype)
    pixels = random.choice([1, 2, 5, 17]) if classes < 5000 else 1
    x = (values.unsqueeze(-1) + torch.randn(n, classes, pixels)).to(dtype)
    return x if layout == "spatial" else x.transpose(1, 2).contiguous().transpose(1, 2)


def geometry(x):
    if x.dim() == 2:
        return (x.shape[0], x.shape[1], 1), (x.stride(0), x.stride(1), 0)
    return (x.shape[0], x.shape[1], x.shape[2]), x.stride()


def random_logits(dtype):
    classes = random.choice(CLASSES)
    n = random.choice([1, 2, 3, 7, 9, 33]) if classes < 5000 else random.choice([1, 2])
    x = lay_out(torch.randn(n, classes) * random.choice([1, 5, 20]), random.choice(LAYOUTS), dtype)
    for value in (-torch.inf, torch.nan, torch.inf, torch.finfo(dtype).min):
        if random.random() < 0.1:
            x[random.randrange(n), random.randrange(classes)] = value
    return x


def one_call():
    dtype = random.choice(list(CODES))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x = random_logits(dtype)
    shape, strides = geometry(x)
    classes, rows = shape[1], shape[0] * shape[2]
    target = torch.randint(0, classes, (rows,))
    target[torch.rand(rows) < 0.2] = -100
    kinds = random.sample(range(NUM_KINDS), random.choice([1, 2, 3]))
    gamma = random.choice([0, 0.5, 1, 2, 0.7])
    program = _cpu.Program([(kind, 1.5, 5.5, 1.5) for kind in kinds], 1e-7, gamma, random.randint(0, ANY_NEEDS))
    weight, coefs = torch.rand(classes, dtype=acc), torch.empty(NUM_COEFS, rows, dtype=acc)
    loss, stats = torch.empty(rows, dtype=acc), torch.empty(NUM_STATS, rows, dtype=torch.float64)
    sums = torch.empty(classes, dtype=torch.float64)
    log_q, scale, output = torch.randn(classes, dtype=acc), torch.rand(1, dtype=acc), torch.rand(rows, dtype=acc)
    grad = torch.empty_like(x)
    grad_strides = geometry(grad)[1]
    code, logits = CODES[dtype], x.data_ptr()
    labels = (target.data_ptr(), 0)
    bad = _cpu.row_loss(
        program, code, shape, logits, strides, random.choice([0, grad.data_ptr()]), grad_strides, *labels, -100,
        random.choice([0, weight.data_ptr()]), random.choice([0, 1, 2]), loss.data_ptr(), coefs.data_ptr(), True,
    )  # fmt: skip
    assert bad == -1
    needs = random.randint(0, ANY_NEEDS)
    _cpu.row_stats(code, shape, logits, strides, *labels, -100, 1e-7, gamma, needs, stats.data_ptr())
    _cpu.column_sums(code, shape, logits, strides, coefs.data_ptr(), sums.data_ptr())
    entropy = random.choice([(0, 0), (log_q.data_ptr(), scale.data_ptr())])
    into, into_strides = random.choice([(grad.data_ptr(), grad_strides), (logits, strides)])
    _cpu.row_grad(
        code, shape, logits, strides, into, into_strides, *labels, 1e-7, gamma, program.needs, coefs.data_ptr(),
        output.data_ptr(), 1, *entropy, False,
    )  # fmt: skip


random.seed(0)
torch.manual_seed(0)
_, _, isa, count = sys.argv
_cpu.set_isa(isa)
for _ in range(int(count)):
    one_call()
print("clean:", isa)
