"""What README.md says in code holds."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import anl_kernels as ak

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def names():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 10, generator=generator)
    y = torch.randint(10, (40,), generator=generator)
    return {"math": math, "torch": torch, "F": F, "anl_kernels": ak, "ak": ak, "logits": logits, "y": y}


def test_before_and_after_are_equal(names):
    before, after = BLOCKS[0].split("# after")
    exec(before, names)
    expected = names["loss"]
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
    exec(BLOCKS[1], names)
    plain = names["anl_ce"](names["logits"], names["y"], **keywords)
    torch.testing.assert_close(ak.anl_ce(names["logits"], names["y"], **keywords), plain)


def test_a_million_classes(names):
    hidden, weight, bias = torch.randn(40, 6), torch.randn(10, 6), torch.randn(10)
    group = None  # one process: its slice is all classes
    names |= dict(
        hidden=hidden, weight=weight, bias=bias, group=group, logits_slice=names["logits"], weight_slice=weight
    )
    for line in BLOCKS[2].strip().splitlines():
        exec(line, names)
        assert names["loss"].isfinite()
    torch.testing.assert_close(names["loss"], ak.anl_ce(F.linear(hidden, weight), names["y"]))


def test_adding_a_loss(names):
    exec(BLOCKS[-1], names)
    expected = (ak.NCE() + 0.5 * ak.MAE())(names["logits"], names["y"], reduction="sum")
    torch.testing.assert_close(names["loss"], expected)


def test_the_two_commands_are_marked():
    text = README.read_text()
    for name in ("demo", "test"):
        assert re.search(rf"<!-- command: {name} -->\n```bash\n.+\n```", text)
