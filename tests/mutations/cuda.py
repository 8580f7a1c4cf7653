"""Mutants of the CUDA kernels and their launchers, as those of python.py."""

SELECT, PLANS, REDUCE = "csrc/cuda/select.cpp", "csrc/cuda/plans.h", "csrc/cuda/reduce.cuh"
SUMS, RESULTS = "csrc/cuda/sums.cuh", "csrc/cuda/results.cuh"
SMALL, SHARED, BLOCK = "csrc/cuda/rows_small.cu", "csrc/cuda/shared_rows.cuh", "csrc/cuda/rows_block.cu"
TICKETS_CUH, PREPARE = "csrc/cuda/tickets.cuh", "csrc/cuda/prepare.cu"
LONG, CLUSTER, SPLIT = "csrc/cuda/long_rows.cuh", "csrc/cuda/cluster_rows.cuh", "csrc/cuda/rows_split.cu"
GRADIENT, SPATIAL, PIXELS = "csrc/cuda/rows_gradient.cu", "csrc/cuda/spatial.cu", "csrc/cuda/pixels.cuh"
SCALAR, TWO_FLOATS = "csrc/cuda/scalar.cuh", "csrc/cuda/two_floats.cuh"
CHIP, PACKED = "csrc/cuda/chip_rows.cuh", "csrc/cuda/packed_sweeps.cuh"
FLOAT_SWEEP = "csrc/cuda/float_sweep.cuh"
FOCAL, EXPS = "csrc/cuda/packed_focal.cuh", "csrc/cuda/class_exps.cuh"
COLUMNS, SCALE = "csrc/cuda/column_sums.cu", "csrc/cuda/scale.cu"
LAUNCH, CLUSTERS = "csrc/cuda/launch.cuh", "csrc/cuda/clusters.cuh"
DEVICE, MODULE = "csrc/cuda/device.cpp", "csrc/cuda/module.cpp"
HOST = "cuda-host and not (sm80 or warp or launches)"
NUMBERS = f'tests/test_conformance.py -k "every_number_of_classes and float32 and {HOST}"'
PAIRS = f'tests/test_conformance.py -k "every_number_of_classes and bfloat16 and {HOST}"'
PIXEL_PAIRS = f'tests/test_conformance.py -k "every_layout and bfloat16 and anl_ce and {HOST}"'
PIXEL_LANES = f'tests/test_conformance.py -k "every_layout and bfloat16 and anl_fl and {HOST}"'
RECOMPUTED = f'tests/test_conformance.py -k "every_number_of_classes and bfloat16 and {HOST}" --thorough'
ALIGNED = "tests/backends/test_cuda.py -k aligned_otherwise"
ANYWHERE = f'tests/test_layout.py -k "begin_anywhere and bfloat16 and {HOST}"'
ROUNDS = f'tests/test_layout.py -k "many_rows and bfloat16 and {HOST}"'
STRETCHES = f'tests/test_conformance.py -k "stretches and 700 and float32 and {HOST}"'
LAYOUT = f'tests/test_conformance.py -k "every_layout and float32 and anl_ce and {HOST}"'
LOSSES = f'tests/test_conformance.py -k "every_loss and 37 and float32 and {HOST}"'
WEIGHTS = f'tests/test_accuracy.py -k "focal_weights and (float16 or bfloat16) and {HOST}"'
FAR = f'tests/test_special_rows.py -k "(far_from or large_number) and bfloat16 and {HOST}"'
FAR_FLOAT = f'tests/test_special_rows.py -k "(far_from or large_number) and float32 and {HOST}"'
BELOW = f'tests/test_special_rows.py -k "just_below and nfl and {HOST}"'
MASKED_NAN = f'tests/test_special_rows.py -k "masked_too and {HOST}"'
ENTROPY = f'tests/backends/test_gradient_pass.py -k "nearly_alike and {HOST}"'
COLUMN_SUMS = "tests/backends/test_cuda.py -k column_sums"
LAUNCHES = "tests/backends/test_cuda_launches.py"
MODELS = "tests/cuda_on_host/test_devices.py"
LONG_PARTS = f"{MODELS} -k 'long_parts and float32'"
ONE_WARP = f"{MODELS} -k 'further and rows and float32 and warp'"
TICKETS = "tests/cuda_on_host/test_tickets.py"
LAUNCHERS = "anl_kernels/backends/cuda.py"

MUTANTS = [
    # ---- plans
    (SMALL, "(aligned ? 0 : PACK_BYTES - size)", "0", ANYWHERE),
    (
        BLOCK,
        "(row_bytes(call) + STATIC_SHARED + RESERVED_SHARED);",
        "(row_bytes(call) + RESERVED_SHARED);",
        f"{LAUNCHES} -k rows_that_one_cta",
    ),
    (
        PLANS,
        "const Strides difference = {l.so - g.so, 0, l.si - g.si};",
        "const Strides difference = {l.so - g.so, 0, 0};",
        LAYOUT,
    ),
    (
        GRADIENT,
        "gradient.parts_per_row = int(ceil_div(K, gradient.classes_per_part));",
        "gradient.parts_per_row = int(K / gradient.classes_per_part);",
        RECOMPUTED,
    ),
    (
        SELECT,
        "if (!few && fits_cluster(call, limits)) return plan_cluster(call, limits);",
        "",
        "tests/backends/test_cuda.py -k selection",
    ),
    # ---- what all kernels share
    (
        REDUCE,
        "if (lane + offset < warps) x = merge(x, other);",
        "x = merge(x, other);",
        f"{MODELS} -k 'every_model and widest'",
    ),
    (
        RESULTS,
        "return call.weight && kind == Label::LIVE ? static_cast<const T*>(call.weight)[y] : T(1);",
        "return kind == Label::BAD ? T(0) : call.weight ? static_cast<const T*>(call.weight)[y] : T(1);",
        'tests/backends/test_cuda.py -k "out_of_bounds and host"',
    ),
    (SUMS, "sums.rebase(sums.of[COUNT] > A(0) ? larger - max : A(0));", "sums.rebase(larger - max);", STRETCHES),
    (SUMS, "return FULL && needs_focal(prog) ? T(1) : inv_sum;", "return inv_sum;", BELOW),
    (SUMS, "lane_index() < count ? places[lane_index()] : none<Sums>()", "places[lane_index()]", NUMBERS),
    (SUMS, "__any_sync(ALL_LANES, own.of[BELOW_MASS] != A(0))", "own.of[BELOW_MASS] != A(0)", STRETCHES),
    (SUMS, "all_finite && fabs(bound) < NEAR}", "fabs(bound) < NEAR}", STRETCHES),
    (
        SUMS,
        "all_finite && fabs(bound) < NEAR}",
        "all_finite}",
        f'tests/test_special_rows.py -k "heights_of and {HOST}"',
    ),
    (SUMS, "INVERSE = 383;", "INVERSE = 381;", NUMBERS),
    (REDUCE, "bits ^ (bits >> 31 & 0x7fffffff)", "bits", NUMBERS),
    (FLOAT_SWEEP, "if (largest(l) >= 0) {", "if (largest(l) > 0) {", FAR_FLOAT),
    (FLOAT_SWEEP, "if (low < MISSING) {", "if (low <= MISSING) {", STRETCHES),
    (FLOAT_SWEEP, "= {1.0f, FLT_MAX};", "= {1.0f, 0.0f};", NUMBERS),
    (FLOAT_SWEEP, "add_down(sums.max, below)", "sums.max", NUMBERS),
    (FLOAT_SWEEP, "fmaf(float(E), of_anchor, -sum_of(l))", "-sum_of(l)", FAR_FLOAT),
    ("csrc/row_math.h", "? missing : value) : value;", "? M::set(0.0) : value) : value;", MASKED_NAN),
    (
        SCALAR,
        "rest = l > T(-0.5) ? -ScalarMath<T>::expm1(l) : T(1) - e;",
        "rest = T(1) - e;",
        f'tests/test_accuracy.py -k "plain_pytorch and nnfl and {HOST}"',
        "a class whose p is nearly 1 has a log p of nearly 0: its weight is lost among the others' roundings",
    ),
    # ---- rows in registers, and in one CTA's memory
    (SMALL, " + j * WARP + int(lane_index())", " + int(lane_index())", ROUNDS),
    (SMALL, "place(row), unread >> j & 1);", "place(row), unread & 1);", ROUNDS),
    (SMALL, "if (rounds > 1) target = batch.target(batch.own(j));", "", ROUNDS),
    (SMALL, "{ return (WARP >> bits) * rounds; }", "{ return WARP >> bits; }", ROUNDS),
    (
        SHARED,
        "      if (lane() < edges) g(row[within]);\n",
        "      if (edges) g(row[within]);\n",
        'tests/test_conformance.py -k "every_number_of_classes and bfloat16 and cuda-host"',
    ),
    (
        SMALL,
        "if (row.second) row.set_second_sums(call.program, second_sums);",
        "row.set_second_sums(call.program, second_sums);",
        LOSSES,
        "the sums of a row that needs no second sweep are right as well",
    ),
    (
        CHIP,
        "if (needs_second(program)) {\n    __syncthreads();",
        "if (needs_second(program)) {",
        NUMBERS,
    ),
    (LONG, "if (!whole_packs) return write_elements", "if (false) return write_elements", ALIGNED),
    # ---- long rows
    (LONG, "edge == target ? gradient.row.target : value", "value", "tests/backends/test_cuda.py -k edges"),
    (LONG, "return away <= (U - 1) * WARP", "return away < (U - 1) * WARP", "tests/backends/test_cuda.py -k edges"),
    (SPLIT, "is_group ? copy_async_wait<GROUPS>()", "is_group ? copy_async_wait<GROUPS + 1>()", LONG_PARTS),
    (SPLIT, "if (is_group) copy_async_commit();  //", "//", LONG_PARTS),
    # ---- words of two classes
    (PACKED, "count += 2.0f * W - (target >= 0 ? 1.0f : 0.0f);", "count += 2.0f * W;", PAIRS),
    (PACKED, "if (any_target) put_half(words, target, 0);", "", PAIRS),
    (PACKED, "if (any_target) put_half(words, target, twice(Format<S>::LOWEST));", "", PAIRS),
    (PACKED, "fmaf(-found, lift, fmaf(-2.0f * W, low, sum.of[0] + sum.of[2]))", "sum.of[0] + sum.of[2]", PAIRS),
    (PACKED, "count = add2<S>(count, above2<S>(words[j], bound));", "count = above2<S>(words[j], bound);", PAIRS),
    (PACKED, "fmaf(-found, clamp[half] - base, fmaf(-words, base, raised.of[half]))", "raised.of[half]", PAIRS),
    (PACKED, "(int32_t(bits) < 0 ? 0xffff : 0)", "0", PAIRS),
    (SHARED, "whole * P + turns(edges)", "whole * P", PAIRS),
    (SHARED, "row[i < before ? i : i + within]", "row[i + within]", PAIRS),
    (SHARED, "before = TURNS ? (P - first % P) % P : 0;", "before = 0;", PAIRS),
    (SHARED, "max(0, classes - before) / P", "classes / P", PAIRS),
    (SHARED, "[&](S edge) { sweep.add_height(s, widen(edge)); }", "[&](S) {}", PAIRS),
    (SHARED, "[&](S edge) { found.add(widen(edge)); }", "[&](S) {}", ANYWHERE),
    (
        SMALL,
        "(crowded() || K > MOST_OF_LANE * lanes)",
        "crowded()",
        PAIRS,
        "no GPU has so much shared memory that rows of so many classes have few lanes",
    ),
    (TWO_FLOATS, "for (int j = 2; j < E; j += 2) sum = add2", "for (int j = 2; j < E - 2; j += 2) sum = add2", NUMBERS),
    (EXPS, "for (int j = 0; j + 1 < E; j += 2) {", "for (int j = 0; j + 3 < E; j += 2) {", NUMBERS),
    (EXPS, "-sum_of(l)) * inverse()", "-sum_of(z)) * inverse()", NUMBERS),
    (PIXELS, "heights.finish(v, T(end - begin), sums[v]);", "heights.finish(0, T(end - begin), sums[v]);", PIXEL_PAIRS),
    (PACKED, "if (z == -float(INF)) return;", "", PAIRS),
    (PACKED, "tail *= about(base).scale_to(about(largest));", "", PAIRS),
    (FOCAL, "second = 0.5f * gamma", "second = 0.0f * gamma", WEIGHTS),
    (FOCAL, "LOG_MOST = -5.5451775f", "LOG_MOST = -3.0f", WEIGHTS),
    (FOCAL, "if (any_target) put_half(words, target, 0);", "", WEIGHTS),
    (FOCAL, "count += 2.0f * W - (target >= 0 ? 1.0f : 0.0f);", "count += 2.0f * W;", WEIGHTS),
    (FOCAL, "fmaf(-x, u_low, ux)", "ux", WEIGHTS),
    (FOCAL, "found - u_above", "found - u", WEIGHTS),
    (FOCAL, "if (z > low_half<S>(top)) put_half(words, j", "if (false) put_half(words, j", WEIGHTS),
    (FOCAL, "diagonals_of_above<S, 2>(high - low)", "diagonals_of_above<S, 2>(0.0f)", WEIGHTS),
    (FOCAL, " + (g.row.weight_above - g.row.weight)", "", WEIGHTS),
    (FOCAL, "rest = exp2_approx(g.max * log2e_rest<S>())", "rest = 1.0f", FAR),
    (SUMS, "s.max > -float(INF) && tail < 1.0f ? 1.0f : tail;", "tail;", PAIRS),
    (SUMS, "M::add_where(z > bound, sums.of[ABOVE_COUNT], T(1));", "", LAYOUT),
    (EXPS, "const float unit = fabsf(anchor) < FAR ? LOG2_E : 1.0f;", "const float unit = LOG2_E;", FAR),
    (PACKED, "!(fabsf(g.max) < MOST)", "false", FAR),
    (LONG, "if (all_exist && gradient.row.slope", "if (gradient.row.slope", STRETCHES),
    (
        CLUSTER,
        "rows.slot = slot;\n      rows.round = round;",
        "rows.slot = slot;",
        f'tests/test_conformance.py -k "thousands and float32 and rows and {HOST}"',
    ),
    (CLUSTER, "      turn ^= 1;\n", "", ONE_WARP),
    (CLUSTER, "queued.kind == Label::LIVE ? queued.packs : 0", "queued.packs", ONE_WARP),
    (CLUSTER, "    copy_next();  // of rows", "    // of rows", f"{MODELS} -k runs_of_ignored"),
    (CLUSTER, "    hold(n + 1);\n", "", f"{MODELS} -k partly_in_registers"),
    (
        SPLIT,
        "split.separate_launches ? 0 : 2 + 2 * num_rows",
        "split.separate_launches ? 0 : 2 + num_rows",
        f"{TICKETS} -k 'held_anything and split'",
    ),
    (
        SPLIT,
        "if (item.phase == FIRST && item.part == 0) {",
        "if (item.phase == FIRST) {",
        f"{TICKETS} -k 'held_anything and split'",
    ),
    # ---- gradients from coefficients, any strides, sums down the rows
    (PIXELS, "if (j < count) put_some(j, std::true_type());", "", PIXEL_PAIRS),
    (PIXELS, "put(read ? words[u] : living(words[u]), j + u);", "put(words[u], j + u);", PIXEL_PAIRS),
    (SPATIAL, "given[v].coefs[i] = at->part(v);", "given[v].coefs[i] = at->part(0);", PIXEL_PAIRS),
    (PIXELS, "if (V > 1) z_y[v] = widen(number(target[v], v));", "", PIXEL_PAIRS),
    (PIXELS, "if (__shfl_xor_sync(ALL_LANES, int(any), 1) || any)", "if (any)", PIXEL_LANES),
    (
        PIXELS,
        "reinterpret_cast<uint32_t*>(staged - odd + odd * WARP)",
        "reinterpret_cast<uint32_t*>(staged - odd)",
        PIXEL_LANES,
    ),
    (PIXELS, "? int(n) - AT_ONCE : j;", "? 0 : j;", PIXEL_LANES),
    (GRADIENT, "    given = waiting[threadIdx.x];\n", "", ROUNDS),
    (GRADIENT, "if (!TWO || begin_row >= count) return;", "return;", ROUNDS),
    (GRADIENT, "bits[u - 1] = bits[u];  // as", ";  // as", RECOMPUTED),
    (GRADIENT, "inside < packs * P ? inside / P : y - packs * P;", "inside < packs * P ? inside / P : y;", RECOMPUTED),
    (GRADIENT, "e < end ? e < head ? e : e + packs * P : -1;", "e < head ? e : e + packs * P;", RECOMPUTED),
    (GRADIENT, "entropy.set_lost(entropy_sums(p, row.in(p.call), entropy, shared + WARP));", "", ENTROPY),
    (
        GRADIENT,
        "return row.unread ? own : own + entropy.at(z, log_q[k]);",
        "return own + entropy.at(z, log_q[k]);",
        f'tests/test_entropy.py -k "without_rows and {HOST}"',
    ),
    (
        SPATIAL,
        "if (pixels.groups == 1 ? second : __syncthreads_or(second)) {",
        "if (second) {",
        f'tests/test_special_rows.py -k "a_row_of_nan and anl_ce and transposed and {HOST}"',
    ),
    (
        PIXELS,
        "          if (fold < end) clear(sums[v]);\n",
        "",
        f'tests/test_conformance.py -k "thousands and float32 and transposed and {HOST}"',
    ),
    (COLUMNS, "if (++i == p.call.inner) i = 0, ++o;", "++i;", COLUMN_SUMS),
    (COLUMNS, "i = chunk * plan.rows_per_chunk % p.call.inner;", "i = 0;", COLUMN_SUMS),
    (
        SCALE,
        "const int64_t tiles = ceil_div(n + P - 1, tile)",
        "const int64_t tiles = ceil_div(n, tile)",
        "tests/backends/test_cuda.py -k 'scaling and float32'",
    ),
    (
        SCALE,
        "if (at < 3 && stride == s.strides[at] * s.size[at]) {",
        "if (at < 3) {",
        "tests/backends/test_cuda.py -k 'scaling and float32'",
    ),
    # ---- launches
    (
        LAUNCH,
        "constexpr size_t WITHOUT_ASKING = 32 << 10;",
        "constexpr size_t WITHOUT_ASKING = 48 << 10;",
        f"{MODELS} -k 'every_model and 48'",
    ),
    (CLUSTERS, "attributes.ptxVersion < HAS_CLUSTERS || ", "", f"{MODELS} -k 'of-80 and widest'"),
    (
        CLUSTERS,
        "while (2 * cluster <= widest) cluster *= 2;",
        "while (2 * cluster < widest) cluster *= 2;",
        f"{MODELS} -k widest_cluster_of",
    ),
    (TICKETS_CUH, "(seen ^ mark) >> COUNT_BITS && ", "seen == 0 && ", f"{TICKETS} -k 'held_anything and block'"),
    (RESULTS, "if (last) give_back(p.loss_ticket);", "", f"{TICKETS} -k 'run_again and block'"),
    (SPLIT, "== gridDim.x - 1) give_back(p.claim);", "== gridDim.x) give_back(p.claim);", f"{TICKETS} -k run_again"),
    (RESULTS, "    wait_for_previous_launch();\n", "", f"{TICKETS} -k 'test_launches and block'"),
    (PREPARE, "int64_t(labels[r]) : call.ignore_index;", "int64_t(labels[r]) : 0;", f"{TICKETS} -k denominator"),
    (DEVICE, "    case cudaErrorNotSupported:\n", "", f"{LAUNCHES} -k falls_to_the_next"),
    (DEVICE, "if (pushed_) driver().pop(&popped);", "", f"{MODELS} -k contexts"),
    (MODULE, "by_ticket && p.plan.loss_parts > 1", "by_ticket", f"{LAUNCHES} -k one_cluster"),
    (
        MODULE,
        "return arch / 10 == number / 10 && arch >= number;",
        "return arch >= number;",
        "tests/backends/test_cuda.py -k compiled_for",
    ),
    (
        MODULE,
        "if (reduction == NONE) call.row_loss = reinterpret_cast<void*>(loss);\n  return run",
        "call.row_loss = reinterpret_cast<void*>(loss);\n  return run",
        "tests/backends/test_cuda.py -k one_launch",
    ),
    # ---- tensors to pointers
    (
        LAUNCHERS,
        "    if shape[0] * shape[2] == 0:\n        return logits.new_zeros(shape[1], dtype=torch.float64)\n",
        "",
        "tests/backends/test_cuda.py -k without_rows",
    ),
    (LAUNCHERS, "    factor = factor.to(acc_dtype(grad.dtype))\n", "", "tests/backends/test_cuda.py -k scaling"),
    (
        LAUNCHERS,
        "trust.trusted(NAME, logits.device, call.explicit)",
        "trust.trusted(NAME, logits.device, True)",
        f"{LAUNCHES} -k not_verified",
    ),
    (
        LAUNCHERS,
        "    except _cuda.LaunchRefused as error:\n        raise LaunchRefused(str(error)) from None\n",
        "    except _cuda.LaunchRefused as error:\n        raise RuntimeError(str(error)) from None\n",
        f"{LAUNCHES} -k reference",
    ),
]
