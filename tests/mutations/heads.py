"""Lines of the linear heads and of slices of the classes, and what stands there instead."""

LINEAR = (
    "tests/test_linear.py tests/test_linear_memory.py "
    "-k 'summed or blocks or plans or hands_out or waits or autocast or gradscaler'"
)
IGNORED = "tests/test_linear_autograd.py -k ignored_rows"
LINEAR_RANK = "tests/test_linear_tensors.py -k 'input_gradients or refused_to_launch'"
SLICES = "tests/test_class_parallel.py -k 'whole_rows or rounding or merged'"
RANKS = "tests/test_class_parallel.py -k threads"
ASKED = "tests/test_unusual_tensors.py -k asked"

MUTANTS = [
    # the linear head
    ("anl_kernels/linear/chunks.py", "in spans(a.shape[1], size):", "in spans(a.shape[1], size)[:1]:", LINEAR),
    (
        "anl_kernels/linear/chunks.py",
        "    for begin, end in spans(len(out), size):\n",
        "    for begin, end in spans(len(out), size)[:1]:\n",
        LINEAR,
    ),
    ("anl_kernels/linear/chunks.py", "beta=keep if begin == 0 else 1", "beta=keep", LINEAR),
    ("anl_kernels/linear/chunks.py", "grad.sum(0, dtype=self.acc)", "grad.sum(0)", LINEAR),
    (
        "anl_kernels/linear/chunks.py",
        "(self.acc if job.in_tiles else job.dtype, self.acc, self.acc)",
        "(self.acc if job.in_tiles else job.dtype, self.acc, job.dtype)",
        LINEAR,
    ),
    (
        "anl_kernels/linear/chunks.py",
        "(self.acc if job.in_tiles else job.dtype, self.acc, self.acc)",
        "(job.dtype, self.acc, self.acc)",
        LINEAR,
    ),
    ("anl_kernels/linear/autograd.py", "keep = again or _keeps_graph()", "keep = True", LINEAR),
    (
        "anl_kernels/linear/autograd.py",
        "products = Products(Matrices(hidden, weight, bias), job, WantsGrad",
        "products = ctx.products = Products(Matrices(hidden, weight, bias), job, WantsGrad",
        LINEAR,
    ),
    (
        "anl_kernels/linear/chunks.py",
        "if rows >= min(num_rows, MIN_ROWS):",
        "if rows > min(num_rows, MIN_ROWS):",
        LINEAR,
    ),
    (
        "anl_kernels/linear/chunks.py",
        "return max(1, -(-total // max(parts, 1)))",
        "return max(1, total // max(parts, 1))",
        LINEAR,
    ),
    (
        "anl_kernels/linear/autograd.py",
        "total = torch.zeros((), dtype=torch.float64, device=hidden.device)",
        "total = torch.zeros((), dtype=acc, device=hidden.device)",
        LINEAR,
    ),
    (
        "anl_kernels/linear/chunks.py",
        "by_hidden = by_hidden.to(self.acc)",
        "by_hidden = by_hidden.contiguous()",
        LINEAR_RANK,
    ),
    ("anl_kernels/linear/__init__.py", "        if call.explicit:\n", "        if False:\n", LINEAR_RANK),
    (
        "anl_kernels/linear/arguments.py",
        "return hidden.masked_fill(~valid.unsqueeze(1), 0.0), None, labels",
        "return hidden, None, labels",
        IGNORED,
    ),
    (
        "anl_kernels/linear/autograd.py",
        "(call.recompute is None and job.dtype is not torch.float16)",
        "call.recompute is None",
        LINEAR,
    ),
    # slices of the classes, and ranks that have them
    (
        "anl_kernels/sharding/slices.py",
        "for begin in range(0, len(logits), step):",
        "for begin in range(0, min(step, len(logits)), step):",
        SLICES,
    ),
    (
        "anl_kernels/sharding/class_group.py",
        "sum(sizes[: dist.get_rank(group)])",
        "sizes[0] * dist.get_rank(group)",
        RANKS,
    ),
    (
        "anl_kernels/sharding/class_group.py",
        "mine.low <= mine.high < max(classes, 1)",
        "mine.low <= mine.high <= max(classes, 1)",
        RANKS,
    ),
    ("anl_kernels/sharding/class_group.py", "repr(call.expression), call.needs,", "call.needs,", RANKS),
    (
        "anl_kernels/sharding/class_group.py",
        "        moments = slices.added(gathered(moments, group))\n",
        "        moments = moments.clone()\n",
        RANKS,
    ),
    (
        "anl_kernels/sharding/class_group.py",
        "total = int((labels * torch.arange(1, len(labels) + 1)).sum())",
        "total = int(labels.sum())",
        RANKS,
    ),
    (
        "anl_kernels/linear/__init__.py",
        "settings = (given.input.shape[-1], max_chunk_bytes, wants_grad)",
        "settings = (given.input.shape[-1], max_chunk_bytes)",
        RANKS,
    ),
    ("anl_kernels/linear/__init__.py", "job.shard.largest, job.dtype", "job.shard.size, job.dtype", RANKS),
    (
        "anl_kernels/linear/__init__.py",
        "values = (bias, class_weight, *options",
        "values = (class_weight, bias, *options",
        ASKED,
    ),
]
