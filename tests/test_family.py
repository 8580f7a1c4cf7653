"""Every place that a loss or a statistic must have: each one that is forgotten is a failure that says what to do.

What the formulas say is judged elsewhere, by the oracle; here, only that none is missing. CONTRIBUTING.md has the
recipes.
"""

import ast
import dataclasses
import inspect
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import helpers
import oracle
import pytest
import torch

import anl_kernels as ak
from anl_kernels import formulas, losses, row_math
from anl_kernels.statistics import STATISTICS
from anl_kernels.terms import Term, _Probe

ROOT, PACKAGE = Path(__file__).resolve().parents[1], Path(ak.__file__).parent
TRITON = "anl_kernels/triton_kernels/row_math.py"
FUNCTIONS = {"CE": "cross_entropy", "FL": "focal"}  # where it is not the term's name
CLASSICS = (losses.CE,)  # losses that need no source

source_tree = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")


def snake(term):
    """EpsCE is eps_ce as a function and in the tests, EPS_CE in C++ and Triton."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", term.__name__).lower()


def function_of(term):
    return FUNCTIONS.get(term.__name__, snake(term))


@cache
def text_of(path):
    return (ROOT / path).read_text()


# ---- what the sources say


@cache
def enumerators(path, enum, prefix=""):
    """{name: value} of an enum in C++, without `prefix` and the counts; the value None where it is no number."""
    code = re.sub(r"//.*", "", text_of(path))
    body = re.search(rf"enum {enum}[^{{]*{{(.*?)}}", code, re.DOTALL)[1]
    entries = re.findall(r"(\w+)\s*(?:=\s*(\w+))?", body)
    values = {name.removeprefix(prefix): value for name, value in entries if not name.startswith(("NUM_", "LEAN_"))}
    return {name: int(value) if value.isdigit() else None for name, value in values.items()}


@cache
def triton_source():
    return ast.parse((PACKAGE / "triton_kernels" / "row_math.py").read_text())


@cache
def triton_names():
    """The constants and named tuples of row_math.py in Triton, which is not imported for it."""
    kept = [node for node in triton_source().body if isinstance(node, (ast.Assign, ast.ClassDef))]
    future = ast.parse("from __future__ import annotations").body
    found = {"tl": SimpleNamespace(constexpr=lambda value: value, tensor=None), "NamedTuple": NamedTuple}
    found["__name__"] = "triton_row_math"
    exec(compile(ast.Module([*future, *kept], []), TRITON, "exec"), found)
    return SimpleNamespace(**found)


@cache
def triton_branches():
    (function,) = [node for node in triton_source().body if getattr(node, "name", "") == "_term"]
    return set(re.findall(r"KIND == (\w+)", ast.unparse(function)))


def fields_of(named_tuple):
    return [name.upper() for name in named_tuple._fields]


# ---- the places of a term: each says what is to be done, or nothing


def parameters_of(term):
    return {field.name: field.default for field in dataclasses.fields(term)}


def own_parameters(function):
    """The parameters of a loss's function, without logits, target and the keywords that all share."""
    shared = inspect.signature(ak.robust_loss).parameters
    parameters = inspect.signature(function).parameters.items()
    return {name: p.default for name, p in parameters if name not in shared and p.kind is not p.VAR_KEYWORD}


def problem():
    return torch.tensor([[0.5, -1.0, 0.25], [0.0, 1.0, -0.5]], dtype=torch.float64), torch.tensor([0, 2])


def kind_in_cpp(term):
    if list(enumerators("csrc/terms.h", "TermKind"))[term.kind : term.kind + 1] != [snake(term).upper()]:
        return f"csrc/terms.h: TermKind needs {snake(term).upper()} at place {term.kind}, as its `kind` says"


def case_in_cpp(term):
    if f"case {snake(term).upper()}:" not in text_of("csrc/terms.h"):
        return f"csrc/terms.h: add_term needs a case {snake(term).upper()}"


def number_in_triton(term):
    if vars(triton_names()).get(snake(term).upper()) != term.kind:
        return f"{TRITON}: the constant {snake(term).upper()} must be {term.kind}"


def branch_in_triton(term):
    if snake(term).upper() not in triton_branches():
        return f"{TRITON}: _term needs a branch for {snake(term).upper()}"


def reads(term):
    """Compares the statistics of the table that `value` reads with those that the names in `reads` stand for."""
    found, declared = _Probe(0.5), _Probe(0.5)
    term().value(found)
    for name in term.reads:
        getattr(declared, name)
    if found.seen != declared.seen:
        return f"losses/: value reads {sorted(found.seen)}, but `reads` says {sorted(declared.seen)}"


def formula_in_oracle(term):
    if snake(term) not in oracle.TERMS:
        return f"tests/support/oracle.py: a function {snake(term)} with the paper's formula, and its name in TERMS"
    known = list(inspect.signature(oracle.TERMS[snake(term)]).parameters)[3:]
    if missing := parameters_of(term).keys() - set(known):
        return f"tests/support/oracle.py: {snake(term)} needs the parameters {missing}"


def formula_in_mpmath(term):
    (z, y), terms = problem(), ((1.0, snake(term), parameters_of(term)),)
    try:
        exact = [float(oracle._exact_value(terms, row, row, int(label), 1e-7)) for row, label in zip(z.tolist(), y)]
    except KeyError:
        return f'tests/support/oracle.py: the formula of "{snake(term)}" in _exact_value, in mpmath'
    if formula_in_oracle(term):
        return
    if not torch.allclose(oracle.row_losses(z, y, terms), torch.tensor(exact).double()):
        return "tests/support/oracle.py: its formula in mpmath is another than the one in PyTorch"


def formula_of_check(term):
    name = function_of(term)
    if not hasattr(formulas, name):
        return f"anl_kernels/formulas.py: {name}(z, y, parameters), for `python -m anl_kernels check`"
    defaults = own_parameters(getattr(formulas, name))
    if {name: defaults.get(name) for name in parameters_of(term)} != parameters_of(term):
        return f"anl_kernels/formulas.py: {name} needs the parameters and defaults {parameters_of(term)}"


def expression_of_its_own(term):
    alone = [terms[0][1] for terms in helpers.EXPRESSIONS.values() if len(terms) == 1]
    if snake(term) not in alone:
        return "tests/support/expressions.py: an entry of EXPRESSIONS that is this loss alone"


def part_of_everything(term):
    if snake(term) not in [name for _, name, _ in helpers.EXPRESSIONS["everything"]]:
        return 'tests/support/expressions.py: a part of "everything" in EXPRESSIONS'


def public(term):
    if not {term.__name__, function_of(term)} <= set(losses.__all__):
        return f"losses/: the class and {function_of(term)} beside it, both in __all__"
    function = getattr(losses, function_of(term))
    if own_parameters(function) != parameters_of(term):
        return f"losses/: {function_of(term)} needs the parameters and defaults {parameters_of(term)}"
    if not torch.equal(*(loss(*problem(), backend="reference") for loss in (function, term()))):
        return f"losses/: {function_of(term)} is another loss than {term.__name__}"


def function_under_test(term):
    if f'    "{function_of(term)}": [' not in text_of("tests/test_functional.py"):
        return "tests/test_functional.py: cases in FUNCTIONS"


def source_in_docstring(term):
    if term not in CLASSICS and not re.search(r"\b(19|20)\d\d\b", term.__dict__.get("__doc__") or ""):
        return "losses/: a docstring with the formula, and whose it is (names, place, year)"


def row_in_the_table_of_losses(term):
    names, defaults = parameters_of(term), {}
    head = f"| `{function_of(term)}` | `{term.__name__}({', '.join(names)})` |"
    rows = [line for line in text_of("docs/semantics.md").splitlines() if line.startswith(head)]
    for name, value in re.findall(r"(\w+)=([-\d.e]+)", rows[0].split("|")[4]) if rows else []:
        defaults[name] = float(value)
    if not rows or defaults != names:
        return f"docs/semantics.md: a row of the table that begins with {head}, with the defaults {names}"


def named_in_the_readme(term):
    if f"`{function_of(term)}`" not in text_of("README.md"):
        return "README.md: its name in the table of losses"


def loaded_by_default(term):
    if term not in torch.serialization.get_safe_globals():
        return "losses/: in what torch.serialization.add_safe_globals is given"


PLACES = [
    kind_in_cpp, case_in_cpp, number_in_triton, branch_in_triton, reads, formula_in_oracle, formula_in_mpmath,
    formula_of_check, expression_of_its_own, part_of_everything, public, function_under_test, source_in_docstring,
    row_in_the_table_of_losses, named_in_the_readme, loaded_by_default,
]  # fmt: skip
IN_SOURCE = [kind_in_cpp, case_in_cpp, row_in_the_table_of_losses, named_in_the_readme]


def cases(places, in_source):
    return [pytest.param(place, id=place.__name__, marks=[source_tree] * (place in in_source)) for place in places]


def formulas_below(term):
    """The subclasses of a term that have a formula of their own, in the package."""
    below = [found for subclass in term.__subclasses__() for found in [subclass, *formulas_below(subclass)]]
    return [t for t in dict.fromkeys(below) if "value" in vars(t) and t.__module__.startswith("anl_kernels.")]


@pytest.mark.parametrize("place", cases(PLACES, IN_SOURCE))
@pytest.mark.parametrize("term", losses.BUILT_IN, ids=lambda term: term.__name__)
def test_a_loss_has_its_place(term, place):
    what_to_do = place(term)
    assert not what_to_do, f"{term.__name__}: {what_to_do}"


@pytest.mark.parametrize("term", formulas_below(Term), ids=lambda term: term.__name__)
def test_a_loss_is_built_in(term):
    """And has the kind that is its place; else it is a RowLoss."""
    if term is not ak.RowLoss:
        assert term in losses.BUILT_IN, f"losses/: {term.__name__} needs a kind, and its place in __all__"
        assert term.kind == losses.BUILT_IN.index(term)


# ---- the places of a statistic


def doc(statistic):
    if not statistic.doc.strip():
        return "its doc, a line"


def formula(statistic):
    made_at_once = ("target_log_prob",)  # by reference.LogitStatistics, from what it needs anyway
    if statistic.derive is None and statistic.formula is None and statistic.name not in made_at_once:
        return "its formula, in row_math.py"
    if (statistic.field is None) == (statistic.derive is None):
        return "either a field of the table, or a formula of other statistics"


def named_in_the_docs(statistic):
    pages = text_of("docs/semantics.md") + text_of("docs/architecture.md")
    if f"`{statistic.name}`" not in pages:
        return "its name in docs/semantics.md, under RowLoss, or in docs/architecture.md"


@pytest.mark.parametrize("place", cases([doc, formula, named_in_the_docs], [named_in_the_docs]))
@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_has_its_place(name, place):
    what_to_do = place(STATISTICS[name])
    assert not what_to_do, f"{name}: {what_to_do}"


# ---- the layouts that three languages share


def names(enum):
    return [field.name for field in enum]


@source_tree
@pytest.mark.parametrize(
    ("enum", "prefix", "same"),
    [
        ("StatField", "STAT_", row_math.StatField),
        ("CoefField", "COEF_", row_math.CoefField),
        ("FirstSum", "", list(row_math.SliceField)[1:]),  # which begins with the largest logit
        ("SecondSum", "", row_math.SliceSecond),
        ("Needs", "NEED_", row_math.Needs),
    ],
    ids=["StatField", "CoefField", "FirstSum", "SecondSum", "Needs"],
)
def test_cpp_and_python_have_the_same_fields_in_the_same_order(enum, prefix, same):
    found = list(enumerators("csrc/row_math.h", enum, prefix))
    assert found == names(same), f"{enum}: csrc/row_math.h and anl_kernels/row_math.py"


@source_tree
def test_bits_of_needs_are_those_of_cpp():
    assert enumerators("csrc/row_math.h", "Needs", "NEED_") == {need.name: need.value for need in row_math.Needs}


def test_triton_has_the_same_bits_of_needs():
    found = vars(triton_names())
    assert {need.name: found.get(need.name) for need in row_math.Needs} == {n.name: n.value for n in row_math.Needs}
    swept = sum(int(need) for need in row_math.Needs if row_math.second_fields(need))
    assert (found["ANY_FOCAL"], found["IN_SECOND_SWEEP"]) == (row_math.ANY_FOCAL, swept)


def test_triton_has_the_same_sums():
    triton = triton_names()
    assert [name for name in fields_of(triton.FirstSums) if name != "LOW"] == names(row_math.SliceField)
    assert sorted(fields_of(triton.SecondSums)) == sorted(names(row_math.SliceSecond))
    for folds, bits, sums in (
        (triton.FIRST_FOLDS, triton.FIRST_BITS, triton.FirstSums),
        (triton.SECOND_FOLDS, triton.SECOND_BITS, triton.SecondSums),
    ):
        assert len(folds) == len(bits) == len(sums._fields), f"{TRITON}: a fold and a bit per field of {sums.__name__}"


def test_triton_has_the_same_coefficients():
    triton = triton_names()
    assert fields_of(triton.GradCoefs) == names(row_math.CoefField)
    assert len(triton.COEF_BITS) == len(triton.IS_LINEAR) == triton.NUM_COEFS == row_math.NUM_COEFS


@source_tree
def test_the_sanitizers_table_has_as_many_statistics():
    """What calls.py, which runs without PyTorch, says of it."""
    text = text_of("tests/cuda_on_host/calls.py")
    numbers = re.search(r"ALL_NEEDS, NUM_STATS, NUM_COEFS = (\d+), (\d+), (\d+)", text).groups()
    assert list(map(int, numbers)) == [row_math.ANY_NEEDS, row_math.NUM_STATS, row_math.NUM_COEFS]


def test_triton_s_table_has_as_many_statistics():
    """In the order of StatField; below_mass stands where the table has the mass above the clamp."""
    triton = triton_names()
    assert triton.NUM_STATS == row_math.NUM_STATS
    seconds = [name.replace("BELOW_MASS", "ABOVE_MASS") for name in fields_of(triton.SecondSums)]
    fields = names(row_math.StatField)
    assert fields[5 : 5 + len(seconds)] == seconds, f"{TRITON}: all_statistics writes SecondSums in StatField's order"
