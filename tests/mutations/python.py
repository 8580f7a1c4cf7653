"""Mutants of the Python: (file, what stands there once, what stands there instead, the tests that notice).

Lines of the linear heads and of slices are in heads.py.
"""

SLICES = "tests/test_class_parallel.py -k 'whole_rows or rounding or merged'"
RANKS = "tests/test_class_parallel.py -k threads"
AUTOGRAD = (
    "tests/test_autograd.py tests/test_inplace.py "
    "-k 'hands_out or split_made or be_copied or (cpu and (backward_twice or later_use))'"
)
DERIVATIVES = "tests/test_derivatives.py -k 'every_keyword or order_of_the_derivative or spatial_batch'"
TERMS = (
    "tests/test_terms.py tests/test_row_loss.py tests/test_factors.py "
    "-k 'gammas or without_meaning or parameters_are_numbers or terms_add or fails_on_a_made_up or "
    "equal_terms or identity or long_sum or another_f or confident or numbers_scale or learned_factor'"
)
FUNCTIONAL = (
    "tests/test_functional.py tests/test_family.py -k 'public or keyword_s_value or refused or l1_penalty or bounded "
    "or just_below or clamp_is_checked or kept'"
)
REGISTRY = "tests/test_registry.py -k 'chosen_anew or is_named'"
MODULES = "tests/test_modules.py"
SUGGEST = "tests/test_suggest.py"
CLI = (
    "tests/test_cli.py -k 'there or reference or every_way or nan_and or truth or least or quantiles or turns or exact'"
)
OPS = "tests/test_ops.py -k 'fakes_know or only_the_loss'"
SETUP = "tests/test_setup.py -k 'extensions or architectures'"
TRUST = "tests/test_trust.py"
ASKED = "tests/test_unusual_tensors.py -k asked"
VMAP = "tests/test_autograd.py -k 'test_vmap and cpu'"
TOP = "tests/test_special_rows.py"
TABLE = "tests/test_benchmarks.py -k line_of"

MUTANTS = [
    (
        "anl_kernels/row_math.py",
        "(-torch.expm1(x - log_sum)).clamp(min=0.0) **",
        "(-torch.expm1(x - log_sum)) **",
        SLICES,
    ),
    (
        "anl_kernels/row_math.py",
        "torch.where(inv_sum.isnan(), math.nan, grad)",
        "grad",
        SLICES,
    ),
    (
        "anl_kernels/row_math.py",
        "= first[SliceField.COUNT] + 1.0 + poison",
        "= first[SliceField.COUNT] + 1.0",
        SLICES,
    ),
    (
        "anl_kernels/row_math.py",
        "1.0 - with_target[SliceSecond.BELOW_MASS]",
        "1.0 - second[SliceSecond.BELOW_MASS]",
        SLICES,
    ),
    (
        "anl_kernels/row_math.py",
        "torch.where(above, coefs[CoefField.A_ABOVE], coefs[CoefField.A])",
        "coefs[CoefField.A]",
        SLICES,
    ),
    (
        "anl_kernels/row_math.py",
        "sums[SliceField.SQUARES] * torch.exp(-2.0 * below)",
        "sums[SliceField.SQUARES] * torch.exp(-below)",
        SLICES,
    ),
    ("anl_kernels/reduction.py", "shared = sums * world_size(call.batch_group)", "shared = sums", RANKS),
    ("anl_kernels/row_math.py", "missing = -torch.expm1(log_prob)", "missing = 1.0 - torch.exp(log_prob)", TERMS),
    # autograd
    (
        "anl_kernels/autograd.py",
        "if forward_ad._current_level >= 0 and",
        "if forward_ad._current_level > 0 and",
        DERIVATIVES,
    ),
    (
        "anl_kernels/autograd.py",
        "    torch.autograd.graph.increment_version(logits)\n",
        "",
        AUTOGRAD,
        "to mark logits as overwritten counts a version already, even where PyTorch refuses the mark",
    ),
    (
        "anl_kernels/autograd.py",
        "call = ctx.call.variant(inplace=False) if ctx.call.inplace and torch.is_grad_enabled() else ctx.call",
        "call = ctx.call",
        DERIVATIVES,
    ),
    (
        "anl_kernels/derivatives.py",
        "or grad.is_neg() or grad._is_zerotensor()",
        "or grad._is_zerotensor()",
        "tests/test_unusual_tensors.py -k 'elsewhere and negated'",
    ),
    # shapes
    ("anl_kernels/autograd.py", "if not grad_output.any():", "if not grad_output.all():", AUTOGRAD),
    (
        "anl_kernels/autograd.py",
        "ctx.backend.scaled(grad, grad_output, _keeps_graph())",
        "ctx.backend.scaled(grad, grad_output, True)",
        AUTOGRAD,
    ),
    (
        "anl_kernels/autograd.py",
        "ctx.backend.scaled(grad, grad_output, _keeps_graph())",
        "ctx.backend.scaled(grad, grad_output, False)",
        AUTOGRAD,
    ),
    (
        "anl_kernels/autograd.py",
        "(entropy[0], entropy[1] * seed.detach())",
        "(entropy[0], entropy[1])",
        AUTOGRAD,
    ),
    ("anl_kernels/layout.py", "    if weight.requires_grad:\n", "    if False:\n", FUNCTIONAL),
    ("anl_kernels/layout.py", "if classes * min_prob >= 1.0:", "if classes * min_prob > 1.0:", FUNCTIONAL),
    (
        "anl_kernels/layout.py",
        "if target.device != logits.device:",
        "if target.is_cuda != logits.is_cuda:",
        FUNCTIONAL,
    ),
    (
        "anl_kernels/layout.py",
        "if logits.dim() > 2 and shape_and_strides(logits)[0] is None:",
        "if logits.dim() > 4 and shape_and_strides(logits)[0] is None:",
        AUTOGRAD,
    ),
    # terms
    ("anl_kernels/terms.py", "if not (low < value < math.inf or", "if not (low < value or", TERMS),
    ("anl_kernels/losses/robust.py", "    a: float = 0.6\n", "    a: float = 6.0\n", FUNCTIONAL),
    (
        "anl_kernels/losses/robust.py",
        "(s.top_gap == 0.0)",
        "(s.top_gap < 1e-8)",
        f"{TOP} -k 'the_top_only and reference'",
    ),
    ("anl_kernels/terms.py", "not (s.focal and gamma is None)", "not s.focal", TERMS),
    (
        "anl_kernels/terms.py",
        "return self.gamma == other.gamma and self.parameters == other.parameters",
        "return self.parameters == other.parameters",
        TERMS,
    ),
    (
        "anl_kernels/terms.py",
        "return isinstance(value, numbers.Real) and value == 0",
        "return isinstance(value, numbers.Real)",
        TERMS,
    ),
    ("anl_kernels/terms.py", "known and len(terms) <= MAX_TERMS", "known and len(terms) < MAX_TERMS", TERMS),
    ("anl_kernels/terms.py", "if own is None or own.terms[0][1].f is not self.f:", "if own is None:", TERMS),
    (
        "anl_kernels/terms.py",
        "return self.number, tuple(map(id, self.tensors)), tuple(map(id, self.divisors))",
        "return self.number, tuple(map(id, self.tensors))",
        TERMS,
    ),
    (
        "anl_kernels/terms.py",
        "isinstance(value, bool) or not isinstance(value, numbers.Real)",
        "not isinstance(value, numbers.Real)",
        TERMS,
    ),
    # calls
    (
        "anl_kernels/functional.py",
        "        if len(expression.calls) >= CACHE_SIZE:\n",
        "        if False:\n",
        FUNCTIONAL,
    ),
    ("anl_kernels/functional.py", "known = options, tuple(map(type, options))", "known = options", FUNCTIONAL),
    ("anl_kernels/functional.py", "key = parameters, tuple(map(type, parameters))", "key = parameters", FUNCTIONAL),
    ("anl_kernels/call.py", "if not 0.0 < min_prob < 1.0:", "if not 0.0 <= min_prob < 1.0:", FUNCTIONAL),
    ("anl_kernels/functional.py", "p.abs().sum(dtype=acc_dtype(p.dtype))", "p.abs().sum()", FUNCTIONAL),
    (
        "anl_kernels/call.py",
        "if not -math.inf < entropy_weight < math.inf:",
        "if entropy_weight != entropy_weight:",
        FUNCTIONAL,
    ),
    ("anl_kernels/registry.py", "key = name, logits.device, call.inplace", "key = name, call.inplace", REGISTRY),
    (
        "anl_kernels/registry.py",
        "key = name, logits.device, call.inplace",
        "key = call.backend, logits.device, call.inplace",
        REGISTRY,
    ),
    ("anl_kernels/modules.py", "            recompute=self.recompute,\n", "", MODULES),
    ("anl_kernels/modules.py", "            self._modules.pop(name, None)\n", "", MODULES),
    (
        "anl_kernels/modules.py",
        "learned = {id(t): t for f in factors for t in",
        "learned = {(id(f), id(t)): t for f in factors for t in",
        MODULES,
    ),
    ("anl_kernels/ops.py", "classes = logits.shape[1 if logits.dim() > 1 else 0]", "classes = logits.shape[1]", OPS),
    (
        "anl_kernels/suggest.py",
        "alpha_low * (alpha_high / alpha_low) ** share,",
        "alpha_low + (alpha_high - alpha_low) * share,",
        SUGGEST,
    ),
    (
        "anl_kernels/suggest.py",
        "growth = num_classes * math.log(num_classes)",
        "growth = num_classes * math.log(high)",
        SUGGEST,
    ),
    # in PyTorch's operators
    ("anl_kernels/call.py", 'not in ("", "auto")', '!= "auto"', REGISTRY),
    (
        "anl_kernels/registry.py",
        "if backend.unavailable() or (call and backend.cannot_run(logits, call)):",
        "if False:",
        "tests/backends/test_cuda_launches.py -k 'auto_goes_on or auto_ends or refused_in_backward'",
    ),
    ("anl_kernels/ops.py", "    ctx.mark_non_differentiable(output[1])\n", "", OPS),
    ("anl_kernels/backends/reference.py", "-torch.log1p(rest / target_exp)", "-self.log_sum", TERMS),
    (
        "anl_kernels/backends/reference.py",
        "step):\n        rows = slice(begin, begin + step)\n        grad[rows] =",
        "step):\n        rows = slice(begin, begin + step - 1)\n        grad[rows] =",
        SLICES,
    ),
    # the commands
    (
        "anl_kernels/cli/check.py",
        "compare(loss, backend, logits, target, expected, way)\n        except",
        "compare(loss, backend, logits, target, expected, next(iter(WAYS)))\n        except",
        CLI,
    ),
    ("anl_kernels/cli/check.py", "b if math.isnan(b) else max(a, b)", "max(a, b)", CLI),
    (
        "anl_kernels/cli/check.py",
        "        failed |= any(not row.ok for row in found)\n",
        "        failed = any(not row.ok for row in found)\n",
        CLI,
    ),
    (
        "anl_kernels/cli/check.py",
        "least = 0.1 * want.abs().max().item() + 1e-30",
        "least = want.abs().max().item() + 1e-30",
        CLI,
    ),
    ("anl_kernels/cli/check.py", "    if got.isnan().any():\n", "    if got.isnan().all():\n", CLI),
    ("anl_kernels/formulas.py", "height = (1 - MIN_PROB) ** gamma * CLAMP", "height = CLAMP", CLI),
    ("anl_kernels/cli/verify.py", "found[i * (len(found) - 1) // (CASES - 1)]", "found[i]", CLI),
    ("anl_kernels/cli/contenders.py", "total += loss.item()", "total = loss.item()", CLI),
    ("anl_kernels/cli/timing.py", "index = (step + done) % len(runs)", "index = step", CLI),
    ("anl_kernels/cli/timing.py", "ordered[round(0.9 * last)]", "ordered[last]", CLI),
    ("anl_kernels/cli/timing.py", "peak = max(peak, held)", "peak = held", CLI),
    # transforms and subclasses
    (
        "anl_kernels/functional.py",
        "(weight, *options, class_group, batch_group)))",
        "(weight, *options, batch_group, class_group)))",
        ASKED,
    ),
    (
        "anl_kernels/autograd.py",
        "        if call.entropy_weight:  # the sums are over",
        "        if False:  # the sums are over",
        VMAP,
    ),
    # what is remembered
    (
        "anl_kernels/trust.py",
        "    _trusted.cache_clear()\n    return FILE",
        "    return FILE",
        TRUST,
    ),
    ("anl_kernels/trust.py", " ({arch_of(device)}) with", " with", TRUST),
    ("anl_kernels/cache.py", "{**self.read(), **changes}.items()", "changes.items()", TRUST),
    ("anl_kernels/cache.py", "        if not isinstance(found, dict):\n", "        if found is None:\n", TRUST),
    ("anl_kernels/cli/verify.py", "            for way in WAYS:\n", "            for way in WAYS[:1]:\n", CLI),
    ("anl_kernels/cli/verify.py", "    if known:\n        trust.forget(protocol, device)\n", "", TRUST),
    (
        "anl_kernels/cli/verify.py",
        "{trust.VARIABLE: protocol if known else",
        "{trust.VARIABLE: 'all' if known else",
        TRUST,
    ),
    # installation, benchmarks
    ("setup.py", 'not in ("", "0")', '!= ""', SETUP),
    (
        "setup.py",
        "archs = sorted((word for word in words if word.isdigit()), key=int)",
        "archs = sorted(word for word in words if word.isdigit())",
        SETUP,
    ),
    ("benchmarks/table.py", "other['median_s'] / ours['median_s']", "ours['median_s'] / other['median_s']", TABLE),
    ("benchmarks/table.py", 'if result.get("phase", "both") != "both":', "if False:", TABLE),
]
