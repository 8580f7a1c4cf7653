"""Mutants of the CPU kernels and the headers that CUDA's share with them, as those of python.py."""

ROWS, SWEEPS, SPATIAL = "csrc/cpu/rows.cpp", "csrc/cpu/row_sweeps.h", "csrc/cpu/spatial.cpp"
ROW_GRADIENT, SIMD, STORAGE = "csrc/cpu/row_gradient.h", "csrc/cpu/simd.h", "csrc/cpu/storage.h"
MODULE, MATH, TERMS = "csrc/cpu/module.cpp", "csrc/row_math.h", "csrc/terms.h"
EVERY_LOSS = 'tests/test_conformance.py -k "every_loss and float32 and cpu"'
STRETCHES = 'tests/test_conformance.py -k "stretches and 2311 and float32 and cpu"'
BELOW = 'tests/test_special_rows.py -k "just_below and cpu"'
LAYOUT = 'tests/test_conformance.py -k "every_layout and float32 and cpu"'
CLAMP = 'tests/test_conformance.py -k "around_the_clamp and float32 and cpu"'
NUMBERS = 'tests/test_conformance.py -k "every_number_of_classes and float32 and cpu"'
MASKED_NAN = 'tests/test_special_rows.py -k "masked_too and cpu"'
SAME_BITS = 'tests/backends/test_cpu.py -k "float64_sums"'
CERTAIN = 'tests/test_special_rows.py -k "no_cancellation and float32 and cpu"'
LOWEST = 'tests/test_cases.py -k "lowest_number_in and cpu"'
WEIGHTS = 'tests/test_conformance.py -k "weights_of_many and cpu"'
SLICES = 'tests/test_class_parallel.py -k "slice_stats and float32 and cpu"'
ENTROPY = 'tests/backends/test_gradient_pass.py -k "nearly_alike and cpu"'
HALVES = 'tests/backends/test_cpu.py -k "half_precision and (float16 or bfloat16)"'
AUTOGRAD = "tests/test_autograd.py tests/test_inplace.py tests/test_training_loops.py -k avx512"
FAULTS = "tests/backends/test_cpu_faults.py"
TOP = 'tests/test_special_rows.py -k "the_top_only and cpu and float32"'
NO_TARGET = 'tests/test_special_rows.py -k "target_that_does_not_exist and cpu"'

MUTANTS = [
    # ---- rows whose classes lie side by side
    (ROWS, "s.x_y = z_y == -INF ? NaN : z_y - s.max", "s.x_y = z_y - s.max", NO_TARGET),
    (ROWS, "      s.first.add(first);", "      if (block.max != -INF) s.first.add(first);", SLICES),
    (ROWS, "block.second.set_all_below(first.of[TAIL]);", "block.second.set_all_below(0.0);", BELOW),
    (ROWS, "block.first.of[GAP], x_max - sweep.threshold);", "block.first.of[GAP], -sweep.threshold);", STRETCHES),
    (
        ROWS,
        "min_of<int64_t>(64, GROUP_ELEMENTS / K / LANES * LANES)",
        "min_of<int64_t>(64, GROUP_ELEMENTS / K / LANES * LANES) / num_threads()",
        SAME_BITS,
    ),
    (ROWS, "total += loss.of[0][i] * weight;", "total += loss.of[0][i];", WEIGHTS),
    (ROWS, "y, coefs, grad_output(call_, r), nullptr", "y, coefs, 1.0, nullptr", LAYOUT),
    (ROWS, "needs_focal(prog_) ? 1.0 : exp(-s.log_sum)", "1.0", SLICES),
    (ROW_GRADIENT, "exist = block && block->min != -INF,", "exist = block,", STRETCHES),
    (ROW_GRADIENT, "if (above) part = part.all_above();", "", STRETCHES),
    (ROW_GRADIENT, "norm * ScalarMath::exp(block->max - max)", "norm", STRETCHES),
    (ROW_GRADIENT, "(!exist && part.offset != 0.0)", "false", EVERY_LOSS),
    (
        ROW_GRADIENT,
        "mean_log_q(z, log_q, max, mean_log_q(z, log_q, max, 0.0))",
        "mean_log_q(z, log_q, max, 0.0)",
        ENTROPY,
    ),
    (
        "csrc/cpu/column_sums.h",
        "for (int64_t r = r0; r < min_of(stop, r0 + 32); ++r) {",
        "for (int64_t r = r0; r < min_of(stop, r0 + 31); ++r) {",
        'tests/backends/test_cpu.py -k "column_sums and float32"',
    ),
    (SWEEPS, "sums[0].template add<true>(x, e);", "sums[0].template add<MASKED>(x, e);", NUMBERS),
    (SWEEPS, "((l - center) - lost)", "(l - center)", ENTROPY),
    (SWEEPS, "gradient<SQUARE | CLAMPED, true>", "gradient<SQUARE, true>", STRETCHES),
    (SWEEPS, "gradient<ANY, false>", "gradient<SQUARE | CLAMPED, false>", EVERY_LOSS),
    (SWEEPS, "load_part(log_q + i, m, V{}) - center", "load_part(log_q + i, m, V{})", ENTROPY),
    (SWEEPS, "if (!MASKED) out.of[COUNT] = n - (y >= 0);", "if (!MASKED) out.of[COUNT] = n;", NUMBERS),
    # ---- any strides
    (
        SPATIAL,
        "lost[i] += (sum[i] - next) + part[i];",
        "",
        "tests/backends/test_cpu.py -k equal_numbers",
    ),
    (SPATIAL, "(lost[i] == lost[i] ? lost[i] : V{})", "lost[i]", LOWEST),
    (SPATIAL, "MASKED ? (f.max == T(-INF) ? V{} : f.max) : f.max", "f.max", SLICES),
    (SPATIAL, "y < 0 ? set1(T(K_)) : set1(T(K_ - 1))", "set1(T(K_ - 1))", SLICES),
    (SPATIAL, "target ? V{} : x, target ? V{} : e", "x, target ? V{} : e", NUMBERS),
    (SPATIAL, "if (call_.log_q && any(~live)) clear(~live);", "", 'tests/test_entropy.py -k "without_rows and cpu"'),
    (
        SPATIAL,
        "columns ? ceil_div(num_tiles, 16) : 1",
        "columns ? ceil_div(num_tiles, 8 * num_threads()) : 1",
        SAME_BITS,
    ),
    (
        SPATIAL,
        "const I dead = inv_sum == T(0);",
        "const I dead = {};",
        'tests/test_entropy.py -k "test_entropy and float32 and sum and cpu"',
    ),
    (SPATIAL, "bad = live & (y == NO_CLASS);", "bad = {};", f"{FAULTS} -k between_forward"),
    # ---- vectors
    (STORAGE, "(b + ((b >> 16) & 1) + 0x7fff) >> 16", "(b + 0x8000) >> 16", HALVES),
    (STORAGE, "const IntF out = a < 0x38800000 ? small", "const IntF out = a < 0x38000000 ? small", HALVES),
    (STORAGE, "const IntF special = bit_cast<IntF>(scaled) | 0x7f800000;", "const IntF special = {};", HALVES),
    (
        STORAGE,
        "return (1u << n) - 1u;",
        "return (2u << n) - 1u;",
        'tests/test_conformance.py -k "alignment and float32 and avx512"',
    ),
    (
        STORAGE,
        "_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)",
        "_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_ZERO)",
        'tests/backends/test_cpu.py -k "half_precision and avx2 and (float16 or bfloat16)"',
    ),
    (SIMD, "return vlog_corrected<T>(u, (x - (u - T(1))) / u);", "return vlog_corrected<T>(u, V{});", CERTAIN),
    (
        SIMD,
        "y = y * z + 0.40000972152f;",
        "y = y * z + 0.402f;",
        "tests/backends/test_cpu.py -k 'logarithms and not float64'",
    ),
    # ---- the module, its arguments, a row's mathematics
    (
        MODULE,
        "active_table = runnable_tables().front();",
        "active_table = runnable_tables().back();",
        "tests/backends/test_cpu_module.py -k 'best_instruction_set and not avx2'",
    ),
    (
        MODULE,
        "bad += counts && (y < 0 || y >= K);",
        "bad += counts && y >= K;",
        'tests/test_labels.py -k "out_of_bounds and cpu"',
    ),
    (
        MODULE,
        "for (int64_t k = 0; k < call.num_classes; ++k) call.sums[k] = 0.0;",
        "",
        f"{FAULTS} -k no_rows",
    ),
    (
        "csrc/arguments.h",
        "|| !one_run(call.grad_strides)) return;",
        ") return;",
        'tests/backends/test_cpu.py -k "no_single_run"',
    ),
    (
        "csrc/arguments.h",
        "terms.size() > MAX_TERMS",
        "terms.size() >= MAX_TERMS",
        "tests/backends/test_cpu.py -k sixteen",
    ),
    ("csrc/arguments.h", "pow(1.0 - min_prob, gamma) * p.clamp_height", "p.clamp_height", CLAMP),
    (
        "csrc/call.h",
        "static_cast<const ANL_READ_ONCE uint8_t*>",
        "static_cast<const ANL_READ_ONCE int8_t*>",
        'tests/test_labels.py -k "(last_label or label_dtypes) and cpu"',
    ),
    (
        "csrc/call.h",
        "&& (!call.grad || call.grad_strides.sk == 1)",
        "",
        'tests/backends/test_cpu.py -k "nothing_outside and float32 and anl_ce"',
    ),
    (
        TERMS,
        "f.a += F < infinity ? M::divide(r * (s.second[FOCAL_SUM] + s.second[FOCAL_WEIGHT] * l), F) : zero;",
        "f.a += M::divide(r * (s.second[FOCAL_SUM] + s.second[FOCAL_WEIGHT] * l), F);",
        LOWEST,
    ),
    (TERMS, "const auto top = s.x_y == zero;", "const auto top = s.x_y > M::set(-1e-8);", TOP),
    (TERMS, "(below - below_y) * s.target_prob * f.P", "below * s.target_prob * f.P", CLAMP),
    (
        MATH,
        "out[STAT_ABOVE_COUNT] = above ? s.second[ABOVE_COUNT] + I_y + poison : absent;",
        "out[STAT_ABOVE_COUNT] = above ? s.second[ABOVE_COUNT] + I_y : absent;",
        "tests/backends/test_cpu.py -k every_statistic_of",
    ),
    (MATH, "g.offset_above = b + c[COEF_C] * factor + nan_or_0;", "g.offset_above = b + nan_or_0;", CLAMP),
    (MATH, "b = PARTS & CLAMPED_OFFSET ? (above ? offset_above : offset) : offset;", "b = offset_above;", CLAMP),
    (MATH, "g.missing = nan_or_0;", "g.missing = M::set(0.0);", MASKED_NAN),
    (MATH, "s.second[BELOW_MASS] *= mass_scale;", "", CLAMP),
    (MATH, "of[GAP] += of[COUNT] * by;", "", STRETCHES),
    (MATH, "of[SQUARES] *= shrink * shrink;", "of[SQUARES] *= shrink;", STRETCHES),
    # ---- tensors to pointers
    (
        "anl_kernels/backends/cpu.py",
        "weight = weight.to(acc).contiguous()",
        "weight = weight.to(acc)",
        f"{FAULTS} -k with_gaps",
    ),
    (
        "anl_kernels/backends/cpu.py",
        "    target = target.contiguous()\n    table = logits.new_empty((NUM_STATS,",
        "    table = logits.new_empty((NUM_STATS,",
        f"{FAULTS} -k with_gaps",
    ),
    (
        "anl_kernels/backends/cpu.py",
        "lse = None if lse is None else lse.contiguous()",
        "",
        f"{FAULTS} -k with_gaps",
    ),
    (
        "anl_kernels/backends/cpu.py",
        "    if keep:\n        return grad * factor\n    return grad if",
        "    return grad if",
        AUTOGRAD,
    ),
    (
        "anl_kernels/layout.py",
        "(grad_output.contiguous(), 1) if",
        "(grad_output, 1) if",
        f"{FAULTS} -k with_gaps",
    ),
    (
        "anl_kernels/backends/compiled.py",
        "    if call.inplace:\n        torch.autograd.graph.increment_version(logits)\n",
        "",
        AUTOGRAD,
    ),
]
