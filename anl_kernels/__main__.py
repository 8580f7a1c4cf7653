"""`python -m anl_kernels info | check | demo | bench`."""

from __future__ import annotations

import argparse
import importlib
import sys

from . import __version__

COMMANDS = {
    "info": "what can run here, and what would",
    "check": "compare every backend with float64 on this machine",
    "demo": "train on digits with wrong labels: cross entropy and the robust losses",
    "bench": "time and memory of this package, a copy, PyTorch's formulas and F.cross_entropy",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m anl_kernels", description="Robust losses for noisy labels.")
    parser.add_argument("--version", action="version", version=f"anl_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else argv
    chosen = argv[0] if argv else None
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == chosen:  # the other commands' modules are not needed
            module = importlib.import_module(f"anl_kernels.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
