"""Calls every kernel of a host build, without PyTorch: for the sanitizers.

    python calls.py MODULE CASES [--short BUFFER] [--float32 [--sizes]]

CASES: names from `CASES`, joined by commas, or "all". Every buffer has exactly the size that the kernels are told;
--short names one ("logits", "grad", "target", "coefs") that is one element short, which AddressSanitizer must find.
Prints a digest of all results, which are the same from run to run; with --sizes the sum of what is finite of each.
"""

import argparse
import ctypes
import hashlib
import importlib.util
import math
import random
import struct

LIBC = ctypes.CDLL(None)
LIBC.malloc.restype, LIBC.malloc.argtypes, LIBC.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(4)
SIZES = {FLOAT32: 4, FLOAT64: 8, FLOAT16: 2, BFLOAT16: 2}
CE, NCE, NNCE, NFL, NNFL, RCE, AMSE = 0, 1, 2, 4, 5, 7, 13
ABOVE, ABOVE_MASS, FOCAL, FOCAL_ABOVE, SQUARES = 1, 2, 4, 8, 16
LOSSES = {  # terms, gamma, needs
    "anl_ce": ([(NCE, 1.0, 0.0, 0.0), (NNCE, 1.0, 0.0, 0.0)], 0.0, ABOVE),
    "anl_fl": ([(NFL, 1.0, 0.0, 0.0), (NNFL, 1.0, 0.0, 0.0)], 0.5, FOCAL | FOCAL_ABOVE),
    "nce+rce": ([(NCE, 1.0, 0.0, 0.0), (RCE, 1.0, 9.2, 0.0)], 0.0, ABOVE | ABOVE_MASS),
    "jal_ce": ([(NCE, 1.0, 0.0, 0.0), (AMSE, 1.0, 30.0, 0.0)], 0.0, SQUARES),
    "ce": ([(CE, 1.0, 0.0, 0.0)], 0.0, 0),
}
ALL_NEEDS, NUM_STATS, NUM_COEFS = 31, 15, 11
# name: (device of host_devices.cpp, rows, classes, pixels or 0, dtypes). Sizes choose the kernel: on the small devices
# 64 classes are few, a thousand fill a CTA.
CASES = {
    "small": (0, 7, 37, 0, (FLOAT32, FLOAT64, BFLOAT16)),
    "small_batches": (0, 600, 11, 0, (FLOAT32, BFLOAT16)),  # a row is one thread's
    "small_rounds": (2, 2100, 5, 0, (BFLOAT16,)),  # several rows of a batch are
    "one_cta": (3, 5, 10, 0, (FLOAT32, FLOAT16)),
    "block": (0, 5, 403, 0, (FLOAT32, FLOAT64, BFLOAT16)),
    "block_apart": (0, 5, 403, 0, (FLOAT32, BFLOAT16)),
    "cluster": (0, 6, 1901, 0, (FLOAT32, BFLOAT16)),  # two chunks a row, of more than a warp's packs each
    "cluster_wide": (0, 3, 3001, 0, (FLOAT32, BFLOAT16)),
    "split": (1, 5, 3001, 0, (FLOAT32, FLOAT64, BFLOAT16)),
    "split_long_parts": (12, 2, 30011, 0, (FLOAT32, BFLOAT16)),
    "split_one_row": (0, 1, 5003, 0, (FLOAT32, FLOAT16)),
    "spatial_few": (0, 2, 7, 41, (FLOAT32, FLOAT64, BFLOAT16)),
    "spatial": (0, 1, 131, 35, (FLOAT32, FLOAT64, FLOAT16)),
    "spatial_long": (0, 1, 1203, 3, (FLOAT32, BFLOAT16)),
}
# The gradient's rows are one element further apart: 16 aligned bytes of the logits are not 16 aligned bytes there.
APART = ("block_apart",)


class Buffer:
    """Exactly `size` bytes of malloc's, of which the last `short` are missing."""

    def __init__(self, size, short=0):
        self.size = size - short
        self.address = LIBC.malloc(self.size)

    def __del__(self):
        LIBC.free(self.address)

    def fill(self, data):
        ctypes.memmove(self.address, data, min(len(data), self.size))
        return self

    def bytes(self):
        return ctypes.string_at(self.address, self.size)


def encode(values, dtype):
    if dtype == FLOAT16:
        return struct.pack(f"{len(values)}e", *values)
    if dtype == FLOAT64:
        return struct.pack(f"{len(values)}d", *values)
    data = struct.pack(f"{len(values)}f", *values)
    return data if dtype == FLOAT32 else b"".join(data[i + 2 : i + 4] for i in range(0, len(data), 4))


def decode(data, dtype):
    if dtype == BFLOAT16:
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    kind = "fdef"[dtype]
    return struct.unpack(f"{len(data) // struct.calcsize(kind)}{kind}", data)


class Case:
    """A batch in buffers of its own."""

    def __init__(self, kernels, case, dtype, short=None):
        random.seed(f"{case} {dtype}")  # the same numbers whatever ran before
        self.kernels, self.dtype = kernels, dtype
        self.device, self.outer, self.classes, pixels, _ = CASES[case]
        self.acc = FLOAT64 if dtype == FLOAT64 else FLOAT32
        self.inner = pixels or 1
        self.rows = self.outer * self.inner
        self.shape = (self.outer, self.classes, self.inner)
        self.strides = (self.classes * self.inner, self.inner, 1) if pixels else (self.classes, 1, 0)
        self.gap = 1 if case in APART else 0
        self.grad_strides = (self.classes + self.gap, 1, 0) if self.gap else self.strides
        self.short = short
        self.target = self.new("target", self.rows, 8)
        self.fill_target(self.labels())
        self.values = encode(self.logits(), dtype)
        self.weight = self.numbers(self.classes)
        self.coefs = self.new("coefs", NUM_COEFS * self.rows, SIZES[self.acc])
        self.scratch = []
        self.digest = hashlib.sha256()
        self.sizes = []

    def new(self, name, count, size):
        return Buffer(count * size, size if name == self.short else 0)

    def numbers(self, count):
        return Buffer(count * SIZES[self.acc]).fill(encode([random.random() for _ in range(count)], self.acc))

    def labels(self):
        labels = [random.randrange(self.classes) for _ in range(self.rows)]
        labels[-1] = 0  # the last row's last class does not exist
        if self.rows > 2:  # one ignored, one that does not exist
            labels[1], labels[2] = -100, self.classes
        return labels

    def fill_target(self, labels):
        self.known = labels
        self.target.fill(struct.pack(f"{self.rows}q", *labels))

    def logits(self):
        """Spread so that the clamp cuts through every row; one class that does not exist."""
        values = [random.uniform(0.0, 30.0) for _ in range(self.rows * self.classes)]
        values[-1] = -math.inf
        return values

    def where(self):
        self.scratch.clear()

        def empty(size):
            self.scratch.append(Buffer(size).fill(b"\xff" * size))
            return self.scratch[-1].address

        return self.kernels.Where(self.device, 0, empty)

    def fresh(self):
        count = self.rows * self.classes
        logits = self.new("logits", count, SIZES[self.dtype]).fill(self.values)
        grad = self.new("grad", count + self.rows * self.gap, SIZES[self.dtype])
        return logits, grad.fill(bytes(grad.size)) if self.gap else grad

    def loss(self, program, reduction, with_grad=True, with_coefs=False, inplace=False, weighted=False):
        logits, grad = self.fresh()
        loss = Buffer((self.rows if reduction == 0 else 1) * SIZES[self.acc])
        out = logits if inplace else grad
        self.kernels.row_loss(
            program, self.dtype, self.shape, logits.address, self.strides,
            out.address if with_grad else 0, self.strides if inplace else self.grad_strides, self.target.address, 0,
            -100, self.weight.address if weighted else 0, reduction, loss.address,
            self.coefs.address if with_coefs else 0, self.where(),
        )  # fmt: skip
        return decode(self.note(loss, *[out] * with_grad, *[self.coefs] * with_coefs)[0].bytes(), self.acc)

    def program(self, name):
        terms, gamma, needs = LOSSES[name]
        return self.kernels.Program(terms, 1e-7, gamma, needs)

    def note(self, *results):
        for result in results:
            self.digest.update(result.bytes())
            if self.dtype == FLOAT32:
                self.sizes.append(sum(abs(x) for x in decode(result.bytes(), self.acc) if math.isfinite(x)))
        return results

    def stats(self, gamma):
        logits, _ = self.fresh()
        table = Buffer(NUM_STATS * self.rows * 8)
        self.kernels.row_stats(
            self.dtype, self.shape, logits.address, self.strides, self.target.address, 0, -100, 1e-7, gamma, ALL_NEEDS,
            table.address, self.where(),
        )  # fmt: skip
        self.digest.update(table.bytes())

    def grad(self, needs, gamma, entropy=False, inplace=False):
        logits, grad = self.fresh()
        output, log_q, scale = self.numbers(self.rows), self.numbers(self.classes), self.numbers(1)
        out = logits if inplace else grad
        self.kernels.row_grad(
            self.dtype, self.shape, logits.address, self.strides, out.address,
            self.strides if inplace else self.grad_strides, self.target.address, 0, 1e-7, gamma, needs,
            self.coefs.address, output.address, 1, log_q.address if entropy else 0, scale.address if entropy else 0,
            self.where(),
        )  # fmt: skip
        self.note(out)

    def column_sums(self):
        """All labels exist here: the NaN of any other row would be in every sum."""
        self.fill_target([label if label < self.classes else -100 for label in self.known])
        self.loss(self.program("ce"), 0, with_grad=False, with_coefs=True)
        logits, _ = self.fresh()
        sums = Buffer(self.classes * 8)
        self.kernels.column_sums(
            self.dtype, self.shape, logits.address, self.strides, self.coefs.address, sums.address, self.where()
        )
        self.digest.update(sums.bytes())
        found = decode(sums.bytes(), FLOAT64)
        assert all(math.isclose(x, y, rel_tol=1e-4, abs_tol=1e-9) for x, y in zip(found, self.expected_sums()))

    def expected_sums(self):
        logits, sums = decode(self.values, self.dtype), [0.0] * self.classes
        for row, label in enumerate(self.known):
            if label == -100:
                continue
            first = row // self.inner * self.classes * self.inner + row % self.inner
            z = logits[first : first + self.classes * self.inner : self.inner]
            top = max(z)
            exps = [math.exp(x - top) for x in z]
            total = sum(exps)
            sums = [s + e / total for s, e in zip(sums, exps)]
        return sums

    def scale(self):
        logits, _ = self.fresh()
        factor = self.numbers(1)
        self.kernels.scale(self.dtype, self.shape, logits.address, self.strides, factor.address, self.where())
        self.note(logits)

    def run(self, thorough):
        for name in LOSSES if thorough else ("anl_ce", "anl_fl"):
            program, (_, gamma, needs) = self.program(name), LOSSES[name]
            rows = self.loss(program, 0, with_grad=False, with_coefs=True)
            total = self.loss(program, 2)[0]
            assert math.isnan(total) if self.rows > 2 else math.isclose(total, sum(rows), rel_tol=1e-5)
            assert all(math.isfinite(x) for i, x in enumerate(rows) if i != 2)
            self.loss(program, 1, with_coefs=True, inplace=True, weighted=True)
            self.stats(gamma)
            self.grad(needs, gamma)
            self.grad(needs, gamma, entropy=True, inplace=True)
        self.column_sums()
        self.scale()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("cases")
    parser.add_argument("--short")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--sizes", action="store_true")
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("anl_kernels._cuda", options.module)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    thorough = options.cases == "all"
    for name in CASES if thorough else options.cases.split(","):
        digests = []
        for dtype in [FLOAT32] if options.float32 else CASES[name][-1]:
            case = Case(kernels, name, dtype, options.short)
            case.run(thorough)
            digests += case.sizes if options.sizes else [case.digest.hexdigest()[:16]]
        print("done:", name, *digests, flush=True)


if __name__ == "__main__":
    main()
