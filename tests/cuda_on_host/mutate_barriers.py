"""Takes every barrier, fence and memory order out of csrc/cuda, one at a time, and asks who notices.

    python tests/cuda_on_host/mutate_barriers.py [--only FILE] [--limit SECONDS] [--list]

Each mutant is built for ThreadSanitizer and runs the calls that reach its file, with a few orders of launch, until one
of them fails. Results are kept by content (build/cuda_on_host/mutants): what was run is not run again, and several
processes share the work. A survivor is an error unless SURVIVORS says why it survives.
"""

import argparse
import fcntl
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "support")]
from cuda_on_host import build, sanitizers  # noqa: E402

# file: the calls that come by. A header's are those of a few files that include it.
REACHED_BY = {
    "chip_rows.cuh": "block,cluster",
    "column_sums.cu": "spatial_few,spatial",
    "pixels.cuh": "spatial",
    "reduce.cuh": "block,spatial,cluster",
    "results.cuh": "block,split,small",
    "rows_block.cu": "block,block_apart",
    "cluster_rows.cuh": "cluster",
    "rows_gradient.cu": "small,block",  # one warp has no other barrier
    "rows_small.cu": "small,small_batches,small_rounds",
    "shared_rows.cuh": "small,small_batches,small_rounds",
    "rows_split.cu": "split,split_long_parts",
    "spatial.cu": "spatial",
    "sums.cuh": "block,cluster,split",
    "tickets.cuh": "block,split",
}
EVERYTHING = "small,block,cluster,split,spatial"
ARGUMENTS = r"\(((?:[^()]|\([^()]*\))*)\)"  # with one more pair of parentheses inside
# (what is looked for, [(the mutation's name, what stands there instead)])
REMOVED = [("removed", r"(void)0")]
MUTATIONS = [
    (r"\b__syncthreads\(\)", REMOVED),
    (rf"\b__syncthreads_(?:or|and){ARGUMENTS}", [("removed", r"(\1)")]),
    (rf"\b__syncwarp{ARGUMENTS}", REMOVED),
    (r"\bcluster_(?:sync|arrive|wait)\(\)", REMOVED),
    (rf"\bbarrier_wait{ARGUMENTS}", [*REMOVED, ("relaxed", r"barrier_wait_relaxed(\1)")]),
    (rf"\bbarrier_expect{ARGUMENTS}", [*REMOVED, ("relaxed", r"barrier_expect_relaxed(\1)")]),
    (rf"\bcopy_async_wait<\w+>{ARGUMENTS}", REMOVED),
    (rf"\bload_acquire{ARGUMENTS}", [("relaxed", r"load_relaxed(\1)")]),
    (rf"\bstore_release{ARGUMENTS}", [("relaxed", r"store_relaxed(\1)")]),
    (rf"\badd_release{ARGUMENTS}", [("relaxed", r"add_relaxed(\1)")]),
    (
        rf"\badd_acq_rel{ARGUMENTS}",
        [
            ("relaxed", r"add_relaxed(\1)"),
            ("release alone", r"add_release_alone(\1)"),
            ("acquire alone", r"add_acquire_alone(\1)"),
        ],
    ),
]
# (file, line, mutation): why nothing can notice. The line is its text without the comment; after the line before, if it
# is the same in many places.
FILLED = "barrier_expect(filled + c.slot, bytes);"
SURVIVORS = {
    ("results.cuh", "ANL_STATIC_SHARED(unsigned, last); __syncthreads();", "removed"): (
        "every CTA that brings several parts of the loss has a barrier between them for other reasons"
    ),
    ("cluster_rows.cuh", FILLED, "relaxed"): "who waits, waits for the copy, not for what its thread did before",
}


class Mutant:
    def __init__(self, path, number, line, start, end, instead, mutation):
        self.path, self.number, self.start, self.end = path, number, start, end
        self.instead, self.mutation = instead, mutation
        self.line = line

    @property
    def key(self):
        return self.path.name, self.line, self.mutation

    def text(self):
        lines = self.path.read_text().split("\n")
        line = lines[self.number]
        lines[self.number] = line[: self.start] + self.instead + line[self.end :]
        return "\n".join(lines)


def code_of(line):
    return line.split("//")[0]


def mutants(csrc):
    """In the kernels: not in what defines the primitives, nor in what the host alone runs."""
    for path in sorted([*csrc.glob("cuda/*.cu"), *csrc.glob("cuda/*.cuh")]):
        if path.name in ("primitives.cuh", "launch.cuh", "clusters.cuh"):
            continue
        before = ""
        for number, line in enumerate(path.read_text().split("\n")):
            known = code_of(line).strip()
            if known in ("__syncthreads();", "__syncwarp();", "cluster_sync();"):
                known = f"{before} {known}"
            for pattern, mutations in MUTATIONS:
                for match in re.finditer(pattern, code_of(line)):
                    for mutation, instead in mutations:
                        yield Mutant(path, number, known, *match.span(), match.expand(instead), mutation)
            before = code_of(line).strip() or before


def outcome(result, expected):
    """Who noticed, or None. result: None where it ran out of time."""
    if result is None:
        return "ran out of time"
    if "data race" in result.stderr:
        return "race"
    if result.returncode:
        failed = re.search(r"CUDA on the host: (.*)|(AssertionError)", result.stderr)
        return f"failure: {(failed.group(1) or 'wrong value')[:50]}" if failed else f"exit {result.returncode}"
    return None if result.stdout == expected else "wrong value"


def run(module, cases, seed, limit):
    try:
        return sanitizers.races(module, cases, seed, limit, stop=True)
    except subprocess.TimeoutExpired:
        return None


def name_of(csrc, seeds):
    """A name for what is run: by what it is made of, not where that lies."""
    objects = build.objects_of(build.module_units("thread", csrc), csrc)
    return build.digest(sanitizers.CALLS.read_text(), *(path.name for path in objects), seeds)


def try_mutant(mutant, csrc, expected, seeds, limit):
    """What came of it: kept, or found out now; None where another process is at it."""
    original = mutant.path.read_text()
    try:
        mutant.path.write_text(mutant.text())
        place = build.BUILD / "mutants" / name_of(csrc, seeds)
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            if not place.exists():
                began = time.time()
                killed = find_out(mutant, build.build("thread", csrc), expected, seeds, limit)
                place.write_text(json.dumps({"killed": killed, "seconds": round(time.time() - began)}))
            return json.loads(place.read_text())
    finally:
        mutant.path.write_text(original)


def find_out(mutant, module, expected, seeds, limit):
    for seed in range(seeds):
        for case in REACHED_BY.get(mutant.path.name, EVERYTHING).split(","):
            killed = outcome(run(module, case, seed, limit), expected[case])
            if killed:
                return killed
    return None


def say(mutant, result):
    file, line, mutation = mutant.key
    killed = result and result["killed"]
    reason = SURVIVORS.get(mutant.key)
    verdict = "another process is at it" if result is None else killed or f"SURVIVES ({reason or 'unexplained'})"
    print(f"| {file}:{mutant.number + 1} | `{line[-70:]}` | {mutation} | {verdict} |", flush=True)
    return bool(result) and not killed and not reason


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="a file of csrc/cuda")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        csrc = build.copy_for_races(Path(folder))
        chosen = [m for m in mutants(csrc) if options.only in (None, m.path.name)]
        if options.list:
            return print(*[(m.number + 1, *m.key) for m in chosen], sep="\n")
        module = build.build("thread", csrc)
        cases = {case for m in chosen for case in REACHED_BY.get(m.path.name, EVERYTHING).split(",")}
        expected = {}
        for case in sorted(cases):
            result = run(module, case, 0, 10 * options.limit)
            assert result and outcome(result, result.stdout) is None, (case, result and result.stderr[:3000])
            expected[case] = result.stdout
        survivors = 0
        for mutant in chosen:
            survivors += say(mutant, try_mutant(mutant, csrc, expected, options.seeds, options.limit))
        return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
