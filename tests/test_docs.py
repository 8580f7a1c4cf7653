"""What README.md and docs/ say holds: their code runs, their links and pictures exist."""

import math
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import torch.nn.functional as F

import anl_kernels as ak
from anl_kernels.backends import NAMES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, *sorted((ROOT / "benchmarks").rglob("README.md"))]
PICTURES = sorted(path for path in (ROOT / "docs").rglob("*") if path.suffix in (".svg", ".png"))
PICTURE_BYTES = 60 << 10

source_tree = pytest.mark.skipif(not (ROOT / "benchmarks" / "results").is_dir(), reason="needs the source tree")


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks_of(page), 1)
]


def block_with(text: str) -> str:
    """The one block of all pages that has this in it."""
    (found,) = [block.values[0] for block in BLOCKS if text in block.values[0]]
    return found


@pytest.fixture
def names():
    """What the code on the pages takes as given."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 10, generator=generator)
    hidden, weight, bias = (torch.randn(size, generator=generator) for size in ((40, 6), (10, 6), (10,)))
    group = None  # one process: its slice is all classes
    return {
        "math": math, "torch": torch, "F": F, "anl_kernels": ak, "ak": ak,
        "logits": logits, "y": torch.randint(10, (40,), generator=generator),
        "hidden": hidden, "weight": weight, "bias": bias,
        "group": group, "logits_slice": logits, "weight_slice": weight,
    }  # fmt: skip


# ---- code


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_runs(names, block):
    exec(block, names)
    loss = names.get("loss")
    assert loss is None or loss.isfinite()


def test_pages_with_code_are_found():
    assert {page.stem for page in PAGES if blocks_of(page)} >= {"README", "semantics", "hyperparameters", "migrating"}


@pytest.mark.parametrize("name", NAMES)
def test_every_backend_has_its_row_in_the_readme(name):
    rows = README.read_text().split("## Backends")[1].split("\n## ")[0]
    assert f"\n| `{name}` | " in rows


def test_before_and_after_are_equal(names):
    before, after = block_with("# after: one kernel").split("# after")
    exec(before, names)
    expected = names.pop("loss")
    exec("#" + after, names)
    torch.testing.assert_close(names["loss"], expected)


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"alpha": 5.0, "beta": 2.0, "min_prob": 1e-3},
        {"entropy_weight": 2.0},
        {"ignore_index": 3, "entropy_weight": 1.0, "weight": torch.linspace(0.1, 2.0, 10)},
    ],
)
def test_equivalent_code(names, keywords):
    exec(block_with("def anl_ce("), names)
    plain = names["anl_ce"](names["logits"], names["y"], **keywords)
    torch.testing.assert_close(ak.anl_ce(names["logits"], names["y"], **keywords), plain)


def test_a_million_classes(names):
    for line in block_with("class_group=group").strip().splitlines():
        names.pop("loss", None)
        exec(line, names)
        assert names["loss"].isfinite()
    torch.testing.assert_close(names["loss"], ak.anl_ce(F.linear(names["hidden"], names["weight"]), names["y"]))


def test_adding_a_loss(names):
    exec(block_with("mine = ak.RowLoss"), names)
    expected = (ak.NCE() + 0.5 * ak.MAE())(names["logits"], names["y"], reduction="sum")
    torch.testing.assert_close(names["loss"], expected)


def test_a_module_s_attributes_hold_from_the_next_call_on(names):
    code, learned = block_with("module.alpha = 2.0").split("alpha = torch.nn.Parameter")
    exec(code, names)
    torch.testing.assert_close(names["loss"], ak.anl_ce(names["logits"], names["y"], alpha=2.0, beta=5.0))
    exec("alpha = torch.nn.Parameter" + learned, names)
    names["loss"].backward()
    assert names["alpha"].grad.isfinite()


def test_cross_entropy_is_cross_entropy(names):
    lines = block_with("# or the same loss, by these kernels").splitlines()
    exec(lines[0], names)
    before = names.pop("loss")
    exec(lines[2], names)
    torch.testing.assert_close(names["loss"], before)


# ---- commands, links, pictures


def test_the_two_commands_are_marked():
    text = README.read_text()
    for name in ("demo", "test"):
        assert re.search(rf"<!-- command: {name} -->\n```bash\n.+\n```", text)


def anchors_of(page: Path) -> set[str]:
    """The headings as hosted pages name them in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of every link and picture that stays in the repository."""
    found = re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text())
    parts = [link.partition("#") for link in found]
    return [((page.parent / unquote(file)).resolve() if file else page, anchor) for file, _, anchor in parts]


@source_tree
@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for file, anchor in links_of(page):
        assert file.exists(), file
        if anchor:
            assert anchor in anchors_of(file), f"{file.name} has no heading #{anchor}"


def test_readme_links_to_every_page():
    assert {file for file, _ in links_of(README)} >= set(PAGES[1:])


@source_tree
def test_pictures_are_small_and_shown():
    assert PICTURES
    shown = {file for page in LINKING for file, _ in links_of(page)}
    for picture in PICTURES:
        assert picture.stat().st_size <= PICTURE_BYTES, picture
        assert picture in shown, f"no page shows {picture}"


@source_tree
def test_measured_tables_are_what_the_command_writes(tmp_path):
    pages = [Path("README.md"), Path("docs/benchmarks.md")]
    (tmp_path / "docs").mkdir()
    for page in pages:
        (tmp_path / page).write_text(re.sub(r"(?m)^\| anl_ce .*\n", "", (ROOT / page).read_text()))
    source = re.search(r"^From `(.+)`\.$", README.read_text(), re.MULTILINE)[1]
    command = [sys.executable, "benchmarks/table.py", source, "--into", str(tmp_path / "README.md")]
    subprocess.run(command, check=True, cwd=ROOT)
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text()
    assert len(re.findall(r"(?m)^\| anl_ce ", README.read_text())) == 5


@source_tree
def test_the_map_names_what_there_is():
    text = (ROOT / "docs" / "architecture.md").read_text().split("```\n")[1]
    folder, missing = ROOT, []
    for line in text.splitlines():
        name = line.split()[0]
        folder = ROOT if not line.startswith(" ") else folder
        path = folder / name
        if not line.startswith(" "):
            folder = path
        missing += [] if path.exists() else [str(path)]
    assert not missing
