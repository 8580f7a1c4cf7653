"""How every picture of this folder looks, and how it is saved: as a small SVG file."""

import io
import re
from pathlib import Path

from anl_kernels.cli.common import need

STYLE = {
    "svg.hashsalt": "anl_kernels",  # the same picture is the same file
    "svg.fonttype": "none",  # text stays text: letters drawn as paths were most of a file
    "font.sans-serif": ["DejaVu Sans", "Arial"],
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
LONG = re.compile(r"-?\d+\.\d{3,}")
# What no reader of the file needs: indentation, names of groups, comments, turns by no angle.
UNUSED = re.compile(r"^ +| +$| id=\"[A-Za-z0-9]+_\d+\"|<!-- \$.*-->| transform=\"rotate\(-0 [^\"]*\"", re.MULTILINE)


def use_style() -> None:
    need("matplotlib", "noisy").rcParams.update(STYLE)


def save(figure, file: Path) -> None:
    """Writes coordinates with one digit after the point, not six, and each style once."""
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    text = re.sub(r"<[^>]*>", lambda tag: LONG.sub(lambda number: short(number[0]), tag[0]), written.getvalue())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(styles_once(UNUSED.sub("", text)))


def short(number: str) -> str:
    return f"{float(number):.1f}".removesuffix(".0")


def styles_once(text: str) -> str:
    names: dict[str, str] = {}
    text = re.sub(r' style="([^"]*)"', lambda m: f' class="{names.setdefault(m[1], f"s{len(names)}")}"', text)
    rules = "\n".join(f".{name}{{{style}}}" for style, name in names.items())
    return text.replace("</style>", f"\n{rules}\n</style>", 1)
