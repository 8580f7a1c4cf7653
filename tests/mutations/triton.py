"""Mutants of the Triton kernels and their launchers, as those of python.py."""

SPLIT, ROWS, TILES = (f"anl_kernels/triton_kernels/{name}.py" for name in ("split", "rows", "tiles"))
MATH, FOLDS, SCALARS = (f"anl_kernels/triton_kernels/{name}.py" for name in ("row_math", "folds", "scalar_math"))
GRADIENT, COLUMNS, REDUCE = (f"anl_kernels/triton_kernels/{name}.py" for name in ("gradient", "columns", "reduce"))
LAUNCH, PASSES, AUTOTUNE = (f"anl_kernels/triton_kernels/{name}.py" for name in ("launch", "passes", "autotune"))
BACKEND = "anl_kernels/backends/triton.py"
COMPILED = "tests/triton_kernels/test_intermediate.py"
ON_A_DEVICE = "tests/triton_kernels/test_launch.py -k found_by"

MUTANTS = [
    # memory orders, barriers, offsets
    (SPLIT, 'sem="release"', 'sem="relaxed"', COMPILED),
    (SPLIT, 'while done < count:\n            done = tl.atomic_add(pointer, 0, sem="acquire")',
     'while done < count:\n            done = tl.atomic_add(pointer, 0, sem="relaxed")', COMPILED),
    (SPLIT, "tl.debug_barrier()\n        tl.atomic_add(pointer, 1", "tl.atomic_add(pointer, 1", COMPILED),
    (TILES, "    tl.debug_barrier()\n", "", COMPILED),
    (SPLIT, "block.to(tl.int64) * (FIELDS", "block * (FIELDS", COMPILED),
    (TILES, "start = (block % blocks).to(tl.int64) * BLOCK_N", "start = (block % blocks) * BLOCK_N", COMPILED),
    (REDUCE, "            tile = tl.full([], tile, tl.int64)\n",
     "            tile = tl.full([], tile, tl.int64).to(tl.int32)\n", COMPILED),
    # split rows
    (SPLIT, "wait(p.second_done, p.parts)", "wait(p.first_done, p.parts)",
     "tests/triton_kernels/test_split.py -k each_phase"),
    (PASSES, "(launch.cdiv(p.row_blocks, group) + phases - 1)", "(launch.cdiv(p.row_blocks, group) + phases - 2)",
     "tests/triton_kernels/test_split.py -k 'bits and anl_ce-clamped'"),
    (PASSES, "counters = logits.new_zeros(", "counters = logits.new_empty(",
     "tests/triton_kernels/test_split.py -k 'bits and anl_ce-gradient'"),
    (PASSES, "max(1, min(MAX_PARTS, programs // group))", "max(1, programs // group)",
     "tests/triton_kernels/test_split.py -k plans"),
    (PASSES, "group = min(group, p.row_blocks)", "group = max(group, 1)",
     "tests/triton_kernels/test_split.py -k plans"),
    (PASSES, "min(p.row_blocks, 2 * target.num_sms) * size", "p.row_blocks * size",
     "tests/triton_kernels/test_split.py -k plans"),
    # rows
    (ROWS, " & (v.K <= 16777216)", "", "tests/triton_kernels/test_rows.py"),
    (MATH, "base + last_min(below)", "last_min(below)",
     "tests/triton_kernels/test_rows.py -k low_logits"),
    (MATH, "others, gap = K - 1.0,", "others, gap = K * 1.0,", "tests/triton_kernels/test_rows.py"),
    (MATH, "top = s.x_y == 0.0", "top = s.x_y > -1e-8", "tests/test_special_rows.py -k 'the_top_only and triton'"),
    (MATH, "f.gap - f.count * fall", "f.gap", "tests/test_conformance.py -k 'anl_ce and triton-loop'"),
    (FOLDS, "value = by_row(tl.min(f[i], 1))", "value = by_row(tl.max(f[i], 1))",
     "tests/triton_kernels/test_split.py -k decision"),
    (FOLDS, "bits == 0 or bits & needs != 0", "bits == 0 or bits & needs == bits",
     "tests/test_conformance.py -k 'nnce and triton-loop'"),
    (TILES, "mask=rows.known, other=1.0).to(acc)", "mask=rows.known, other=0.0).to(acc)",
     "tests/triton_kernels/test_rows.py"),
    (TILES, "tl.where(rows.exist & ~rows.ignored, weight, 0.0)", "tl.where(~rows.ignored, weight, 0.0)",
     "tests/test_labels.py -k 'class_weights_of_another and triton'"),
    # mathematics
    (SCALARS, "tl.where(gamma == 0.0, 1.0, 0.0)", "tl.where(gamma == 0.0, 0.0, 0.0)",
     "tests/triton_kernels/test_rows.py"),
    (SCALARS, "return tl.where(x > -0.5, -_expm1_near_0(x), 1.0 - e)", "return 1.0 - e",
     "tests/triton_kernels/test_rows.py -k keeps_its_digits"),
    (MATH, "value = 1.0 - value.to(tl.float64)", "value = 1.0 - value", "tests/triton_kernels/test_rows.py -k float64"),
    (MATH, "tl.where(ignored, count * target, s.second[i] + target)", "s.second[i] + target",
     "tests/triton_kernels/test_rows.py"),
    (SCALARS, "return tl.log(u) + (x - (u - 1.0)) / u", "return tl.log(u)",
     "tests/test_special_rows.py -k 'certain and triton-tile'"),
    (MATH, "a = tl.where(F < INF, r * (others + second.focal_weight * l) / F, 0.0)",
     "a = r * (others + second.focal_weight * l) / F",
     "tests/test_cases.py -k 'lowest and triton and float32'"),
    (MATH, "above = x > r.threshold", "above = x > r.threshold - 1.0",
     "tests/test_conformance.py -k 'around_the_clamp and triton-tile'"),
    # the gradient from coefficients
    (GRADIENT, "((log_q - entropy.center) - entropy.lost)", "(log_q - entropy.center)",
     "tests/triton_kernels/test_gradient.py -k nearly_equal"),
    (MATH, "squares *= shrink * shrink", "squares *= shrink", "tests/test_conformance.py -k 'triton-loop and mse'"),
    (MATH, "ABOVE_MASS, ABOVE, FOCAL, FOCAL_ABOVE, SQ", "ABOVE_MASS, ABOVE, FOCAL, FOCAL, SQ",
     "tests/triton_kernels/test_gradient.py -k 'formula and float32 and 10-8'"),
    (GRADIENT, "log_q is None and config.BLOCK_N == 1 and not", "log_q is None and not",
     "tests/triton_kernels/test_gradient.py -k width"),
    ("anl_kernels/layout.py", "(grad_output.contiguous(), 1) if", "(grad_output, 1) if",
     "tests/triton_kernels/test_backend.py"),
    (BACKEND, "shape_and_strides(grad)[1], target.contiguous(), coefs", "shape_and_strides(grad)[1], target, coefs",
     "tests/triton_kernels/test_backend.py"),
    (BACKEND, "view, target.contiguous())", "view, target)", "tests/triton_kernels/test_backend.py"),
    (BACKEND, "torch.autograd.graph.increment_version(logits)", "pass", "tests/triton_kernels/test_backend.py"),
    # sums
    (COLUMNS, "GROUP = tl.constexpr(8)", "GROUP = tl.constexpr(1 << 20)",
     "tests/triton_kernels/test_columns.py -k in_float64"),
    (COLUMNS, "tl.minimum(group + GROUP, stop)", "group + GROUP",
     "tests/triton_kernels/test_columns.py -k 'many_rows and transposed'"),
    (REDUCE, "known = counts & (label >= 0) & (label < K)", "known = counts & (label >= 0)",
     "tests/triton_kernels/test_reduce.py -k far_outside"),
    # launches
    (LAUNCH, "key.append(-0x80000000 <= arg <= 0x7FFFFFFF)", "key.append(int)", ON_A_DEVICE),
    (LAUNCH, "config.num_warps, config.num_stages, *constexprs", "config.num_stages, *constexprs", ON_A_DEVICE),
    (LAUNCH, "key = [kernel.fn, index, config", "key = [kernel.fn, config", ON_A_DEVICE),
    (LAUNCH, " or not found.known or _profiled():", " or not found.known:",
     "tests/triton_kernels/test_launch.py -k hooks"),
    (LAUNCH, "if outer == 1 or all(so == si * inner", "if outer == 1 or any(so == si * inner",
     "tests/triton_kernels/test_launch.py -k view_of"),
    (LAUNCH, "        with _ONE_AT_A_TIME:\n", "        with threading.Lock():\n",
     "tests/triton_kernels/test_launch.py -k results_of_threads"),
    # tuning
    (AUTOTUNE, "if config.BLOCK_K < num_classes:", "if config.BLOCK_K <= num_classes:",
     "tests/triton_kernels/test_autotune.py -k candidates"),
    (AUTOTUNE, "return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())", "return True",
     "tests/triton_kernels/test_autotune.py -k captured"),
    (AUTOTUNE, "needs{needs} ", "", "tests/triton_kernels/test_autotune.py -k kinds"),
    (PASSES, "autotune.enabled() and not overwrites and", "autotune.enabled() and",
     "tests/triton_kernels/test_autotune.py -k over_the_logits"),
]  # fmt: skip
