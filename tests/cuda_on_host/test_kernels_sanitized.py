"""Every CUDA kernel on the host under AddressSanitizer and ThreadSanitizer, and the proof that each looks."""

import pytest
from cuda_on_host import build, sanitizers

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(build.compiler() is None, reason="needs g++ on Linux and the source tree"),
]


# ---- memory


@pytest.fixture(scope="module")
def address():
    module = build.build("address")
    return lambda *arguments: sanitizers.calls(module, *arguments)


def test_no_access_out_of_bounds_and_no_undefined_behaviour(address):
    result = address("all")
    assert result.returncode == 0, result.stderr[:4000]
    assert result.stdout.count("done") == 14


@pytest.mark.parametrize("buffer", ["logits", "grad", "target", "coefs"])
@pytest.mark.parametrize("case", ["small", "block", "cluster", "spatial"])
def test_one_element_too_many_is_seen(address, case, buffer):
    result = address(case, "--short", buffer)
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr


# ---- races

RACES = "small,small_batches,small_rounds,block,cluster,split,spatial"


@pytest.mark.parametrize("seed", [0, 1])
def test_no_race(tmp_path, seed):
    result = sanitizers.races(build.build("thread", build.copy_for_races(tmp_path)), RACES, seed)
    assert result.returncode == 0, result.stderr[:6000]
    assert result.stdout.count("done") == RACES.count(",") + 1


BARRIER = "__syncthreads();\n"


@pytest.mark.parametrize(
    "source, line, which, instead, case",
    [
        ("pixels.cuh", BARRIER, 0, "\n", "spatial"),
        ("chip_rows.cuh", BARRIER, 0, "\n", "block"),
        ("cluster_rows.cuh", "barrier_wait(&gathered.there, parity);\n", 0, "\n", "cluster"),
        ("cluster_rows.cuh", "__syncwarp();\n", 0, "\n", "cluster"),
        ("rows_split.cu", "add_acq_rel(", 0, "add_relaxed(", "split"),
    ],
    ids=["spatial", "block", "cluster", "warp", "order"],
)
def test_a_removed_barrier_is_seen(tmp_path, source, line, which, instead, case):
    """Number `which` of its kind; and an order between CTAs. mutate_barriers.py takes them all out."""
    csrc = build.copy_for_races(tmp_path)
    broken = csrc / "cuda" / source
    parts = broken.read_text().split(line)
    broken.write_text(line.join(parts[: which + 1]) + instead + line.join(parts[which + 1 :]))
    result = sanitizers.races(build.build("thread", csrc), case, stop=True)
    assert result.returncode != 0 and ("data race" in result.stderr or "CUDA on the host: " in result.stderr)
