"""Breaks one line at a time and asks whether the tests notice.

    python tests/mutants.py [--only TEXT] [--list] [--again] [--jobs N] [--write FILE]

The mutants are in tests/mutations, one module per language; the memory orders of CUDA's kernels have a program of their
own (cuda_on_host/mutate_barriers.py). Each is applied to a copy of the sources, with the compiled modules built anew
where it is C++, and its tests run there until one fails. Outcomes are kept by content in build/mutants.json, so that
only what changed is run again. A survivor is an error unless the mutant says why nothing can notice it.

To be quick, mutants of C++ are compiled for float32 and the baseline instruction set alone, besides what their tests'
arguments name (float64, float16, bfloat16; avx2, avx512).
"""

import argparse
import hashlib
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cuda_on_host import build
from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "mutants.json"
SUPPORT = (
    "tiers",
    "backends_under_test",
    "helpers",
    "expressions",
    "problems",
    "comparison",
    "modes",
    "heads",
    "oracle",
)
SHARED = (
    "conftest.py",
    *(f"support/{name}.py" for name in SUPPORT),
)  # what all tests are made of
PYTEST = ("--thorough", "-x", "-q", "-n", "0", "-p", "no:cacheprovider")
SECONDS = 600  # a mutant whose tests take longer hangs


class Mutant(NamedTuple):
    """One broken line."""

    file: str  # below the repository's root
    old: str  # stands in it once
    new: str
    tests: str  # pytest's arguments
    survives: str = ""  # why nothing can notice

    @property
    def name(self):
        return f"{self.file}: {short(self.old)} -> {short(self.new)}"

    def apply(self, root):
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has this {text.count(self.old)} times, not once: {self.old}")
        (root / self.file).write_text(text.replace(self.old, self.new))

    @property
    def digest(self):
        """A checksum of the mutant, the file that it breaks and the tests that it runs."""
        paths = [ROOT / self.file, *(ROOT / "tests" / name for name in SHARED), *test_files(self.tests)]
        texts = [path.read_bytes() for path in dict.fromkeys(paths)]
        return hashlib.sha256(repr((self[:4], texts)).encode()).hexdigest()


def short(text):
    return re.sub(r"\s+", " ", text.strip()) or "nothing"


def test_files(tests):
    return [ROOT / word.split("::")[0] for word in shlex.split(tests) if word.split("::")[0].endswith(".py")]


def all_mutants():
    from mutations import cpu, cuda, heads, python, triton

    return [Mutant(*mutant) for module in (python, heads, cpu, cuda, triton) for mutant in module.MUTANTS]


class Copy:
    """The sources and the compiled modules in a folder of their own."""

    def __init__(self, folder):
        self.root = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
        )
        files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
        for source in [*files, *(ROOT / "anl_kernels").glob("*.so")]:
            if source.is_file():
                target = self.root / source.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        (self.root / "build").mkdir(parents=True)
        for cache in ("cuda_on_host", "cuda_gates"):  # by content: both may use them
            (ROOT / "build" / cache).mkdir(parents=True, exist_ok=True)
            (self.root / "build" / cache).symlink_to(ROOT / "build" / cache)
        self.environment = {**os.environ, "PYTHONPATH": str(self.root)}

    def run(self, *command):
        command = [sys.executable, *command]
        return subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=SECONDS
        )

    def build_cpu(self, tests):
        """anl_kernels._cpu; the tests build CUDA's kernels themselves."""
        module = build.build_cpu("plain", self.root / "csrc", ["baseline", *named(tests, ("avx2", "avx512"))])
        shutil.copy2(module, self.root / "anl_kernels")

    def outcome_of(self, tests):
        """None: all pass; otherwise the test that fails."""
        try:
            result = self.run("-m", "pytest", *PYTEST, *shlex.split(tests))
        except subprocess.TimeoutExpired:
            return "hangs"
        if result.returncode == 0:
            if " passed" not in result.stdout:
                raise RuntimeError(f"no test ran: pytest {tests}\n{result.stdout[-2000:]}")
            return None
        failed = re.search(r"^(?:FAILED|ERROR) (?:.*/)?(\S+?\.py::\w+)", result.stdout, re.MULTILINE)
        if result.returncode == 1 and failed:
            return failed[1]
        if result.returncode < 0:
            return f"crash, signal {-result.returncode}"
        raise RuntimeError(
            f"pytest {tests} ends with {result.returncode}\n{result.stdout[-3000:]}{result.stderr[-2000:]}"
        )

    def outcome(self, mutant):
        """As outcome_of, with the line broken; without, if the mutant has none."""
        path, header = self.root / mutant.file, self.root / "csrc" / "call.h"
        before = {p: p.read_bytes() for p in (path, header, *(self.root / "anl_kernels").glob("_cpu.*.so"))}
        compiled = mutant.file.startswith("csrc/")
        try:
            if compiled:
                dtypes = ("float32", *named(mutant.tests, ("float64", "float16", "bfloat16")))
                build.compile_only(self.root / "csrc", [dtype.upper() for dtype in dtypes])
            if mutant.old:
                mutant.apply(self.root)
            if compiled and "cuda" not in mutant.tests:
                self.build_cpu(mutant.tests)
            return self.outcome_of(mutant.tests)
        finally:
            for p, content in before.items():
                p.write_bytes(content)


def named(text, words):
    return [word for word in words if word in re.findall(r"b?float\d+|avx\d+", text.lower())]


def run_all(chosen, again, jobs):
    """[(mutant, its outcome)]; a RuntimeError where there is none."""
    kept = {} if again or not KEPT.exists() else json.loads(KEPT.read_text())
    lock = threading.Lock()
    with tempfile.TemporaryDirectory(prefix="anl_mutants_") as folder, ThreadPoolExecutor(jobs) as pool:
        copies = queue.SimpleQueue()
        for i in range(jobs):
            copies.put(Copy(Path(folder, str(i))))

        def run(mutant):
            if mutant.digest in kept:
                return kept[mutant.digest]
            copy = copies.get()
            try:
                outcome = controlled(mutant, copy, kept)
            except RuntimeError as error:
                return error
            finally:
                copies.put(copy)
            with lock:
                kept[mutant.digest] = outcome
                KEPT.parent.mkdir(exist_ok=True)
                KEPT.write_text(json.dumps(kept, indent=0))
            return outcome

        yield from zip(chosen, tqdm(pool.map(run, chosen), total=len(chosen), unit="mutant"))


def controlled(mutant, copy, kept):
    """Its outcome; without the mutant every test passes."""
    control = Mutant(mutant.file, "", "", mutant.tests)
    if control.digest not in kept:
        failed = copy.outcome(control)
        if failed:
            raise RuntimeError(f"fails without a mutant: {failed} (pytest {mutant.tests})")
        kept[control.digest] = None
    return copy.outcome(mutant)


def verdict(mutant, outcome):
    if isinstance(outcome, RuntimeError):
        return f"NOT RUN: {outcome}"
    if outcome:
        return f"killed by {outcome}" if "::" in outcome else f"killed: {outcome}"
    return f"survives: {mutant.survives}" if mutant.survives else "SURVIVES"


def report(outcomes):
    killed = sum(isinstance(outcome, str) for _, outcome in outcomes)
    rows = [
        (*(f"`{cut(text)}`" for text in (m.file, short(m.old), short(m.new))), verdict(m, outcome))
        for m, outcome in outcomes
    ]
    table = tabulate([[str(cell).replace("|", "\\|") for cell in row] for row in rows], HEADINGS, tablefmt="github")
    return (
        f"{killed} of {len(outcomes)} mutants are killed ({100 * killed / max(1, len(outcomes)):.0f} %).\n\n{table}\n"
    )


HEADINGS = ("file", "line", "mutated", "outcome")


def cut(text, length=90):
    return text if len(text) <= length else text[: length - 3] + "..."


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="mutants with this in their name")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--again", action="store_true", help="forget what is kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", type=Path, metavar="FILE", help="the table as Markdown")
    options = parser.parse_args()
    chosen = [mutant for mutant in all_mutants() if options.only in mutant.name]
    if options.list:
        return print(*(mutant.name for mutant in chosen), sep="\n")
    outcomes = []
    for mutant, outcome in run_all(chosen, options.again, options.jobs):
        outcomes.append((mutant, outcome))
        tqdm.write(f"{mutant.name}: {verdict(mutant, outcome)}")
    print(report(outcomes))
    if options.write:
        options.write.write_text(f"# Mutants\n\n`python tests/mutants.py`: {report(outcomes)}")
    return not all(isinstance(outcome, str) or (outcome is None and mutant.survives) for mutant, outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
