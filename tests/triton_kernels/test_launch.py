"""Launching: what is compiled anew, and what is passed on to what has been compiled."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import helpers
import offline
import pytest
import torch
import tritons
from backends_under_test import Backend
from tiers import thorough

from anl_kernels.triton_kernels import launch

LAUNCHES = str(Path(__file__).with_name("launches.py"))


@pytest.fixture(scope="module")
def launches():
    return offline.in_a_process(LAUNCHES, "signatures", "compilations", "keys", "hooks")


@pytest.fixture(scope="module")
def further_launches():
    return offline.in_a_process(LAUNCHES, "arguments", "threads")


def test_every_kernel_can_be_launched_by_its_types_alone(launches):
    """Numbers are not compiled in unless they are constexpr, and those come last: `launch` relies on both."""
    kernels = launches["signatures"]
    assert {"tile_kernel", "loop_kernel", "gradient_kernel", "columns_kernel", "sum_kernel"} <= set(kernels)
    for name, kernel in kernels.items():
        assert kernel["constexprs_last"], name
        assert not kernel["specialized"], name


def test_what_is_compiled_anew(launches):
    counts = launches["compilations"]
    new = {"first", "focal", "weights", "odd classes", "another sum"}
    assert all(counts[name] >= 1 for name in new), counts
    assert not any(count for name, count in counts.items() if name not in new), counts


def test_what_a_compiled_kernel_is_found_by(launches):
    assert launches["keys"] == ["nothing"]


def test_hooks_are_called_for_compiled_kernels(launches):
    assert launches["hooks"] == [True, True, False]


@pytest.mark.thorough
def test_threads_at_once(further_launches):
    assert further_launches["threads"]["launches"] >= 18
    assert not further_launches["threads"]["wrong"]


@pytest.mark.parametrize("way", [thorough("tile"), "split"])
def test_results_of_threads_at_once(way, device):
    problems = [(helpers.batch(classes, torch.float32), name) for classes in (10, 65) for name in ("anl_ce", "anl_fl")]
    run = lambda problem: helpers.calculate(
        *problem[0], helpers.expression(helpers.EXPRESSIONS[problem[1]]), backend="triton"
    )
    interval = sys.getswitchinterval()
    with Backend("triton", way).in_use(), ThreadPoolExecutor(4) as pool:
        expected = [run(problem) for problem in problems]
        sys.setswitchinterval(1e-4)
        try:
            results = list(pool.map(run, problems))
        finally:
            sys.setswitchinterval(interval)
    for (loss, grad), (expected_loss, expected_grad) in zip(results, expected):
        assert torch.equal(loss, expected_loss) and torch.equal(grad, expected_grad)


@pytest.mark.thorough
def test_a_kernel_that_is_compiled_gets_what_triton_would_pass(further_launches):
    found = further_launches["arguments"]
    assert found["compared"] >= 20
    assert not found["wrong"]


@pytest.mark.thorough
@pytest.mark.parametrize("release", tritons.RELEASES)
def test_launches_that_do_without_triton_pass_on_the_same(release):
    """CompiledKernel.run is Triton's own affair: it is called by the releases we know, and by no other."""
    found = offline.in_a_process(LAUNCHES, "private", triton=tritons.folder_of(release))["private"]
    assert found["version"] == release
    for made in (found["known"], found["unknown"]):
        assert made["compared"] >= 4 and not made["wrong"]
    assert found["known"]["by Triton"] == found["known"]["compared"]
    assert found["unknown"]["by Triton"] == 2 * found["unknown"]["compared"]


SHAPES = {
    "rows": ((5, 16, 1), [(16, 1, 0)], (1, 5, 16, (0, 1, 16), 1, 8)),
    "odd": ((5, 15, 1), [(15, 1, 0)], (1, 5, 15, (0, 1, 15), 1, 1)),
    "padded": ((5, 16, 1), [(24, 1, 0)], (1, 5, 16, (0, 1, 24), 1, 8)),
    "badly padded": ((5, 16, 1), [(17, 1, 0)], (1, 5, 16, (0, 1, 17), 1, 1)),
    "one row": ((1, 16, 1), [(17, 1, 0)], (1, 1, 16, (0, 1, 17), 1, 8)),
    "two tensors": ((5, 16, 1), [(16, 1, 0), (20, 1, 0)], (1, 5, 16, (0, 1, 16, 0, 1, 20), 1, 1)),
    "transposed": ((6, 16, 1), [(1, 6, 0)], (1, 6, 16, (0, 6, 1), 2, 2)),
    "spatial": ((2, 5, 6), [(30, 6, 1)], (2, 6, 5, (30, 6, 1), 2, 2)),
    "odd spatial": ((2, 5, 7), [(35, 7, 1)], (2, 7, 5, (35, 7, 1), 2, 1)),
    "channels last": ((2, 8, 6), [(48, 1, 8)], (1, 12, 8, (0, 1, 8), 1, 8)),
    "channels last, gradient not": ((2, 8, 6), [(48, 1, 8), (48, 6, 1)], (2, 6, 8, (48, 1, 8, 48, 6, 1), 0, 1)),
    "hole": ((2, 8, 6), [(96, 2, 16)], (1, 12, 8, (0, 2, 16), 0, 1)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_view_of(name):
    """bfloat16: 8 elements of a row make 16 bytes, 2 lanes 4."""
    shape, strides, expected = SHAPES[name]
    assert launch.view_of(shape, 2, *strides) == expected


def test_same_misalignment():
    memory = torch.empty(1000, dtype=torch.bfloat16)
    rows = lambda start, stride: memory[start : start + 300].as_strided((4, 33), (stride, 1))
    same = lambda *tensors: launch.same_misalignment(
        launch.view_of((4, 33, 1), 2, *[(t.stride(0), 1, 0) for t in tensors]), *tensors
    )
    assert same(rows(0, 33), rows(0, 33)) and same(rows(3, 33), rows(3, 41)) and same(rows(1, 33), rows(9, 33))
    assert not same(rows(0, 33), rows(1, 33)) and not same(rows(0, 33), rows(0, 34))


@pytest.mark.parametrize("name", ["cuda:90", "hip:gfx942"])
def test_blocks_are_powers_of_two_that_fit(name):
    target = launch.Target(name, 64 if "hip" in name else 32, 132, 50 << 20)
    for classes in (2, 10, 100, 1000, 8192, 16384):
        for rows in (1, 7, 128, 100000):
            for spatial in (False, True):
                for itemsize in (2, 4, 8):
                    for choose in (launch.choose_tile, launch.choose_loop):
                        config = choose(rows, classes, spatial, itemsize, target)
                        for size in (config.BLOCK_N, config.BLOCK_K, config.num_warps):
                            assert size >= 1 and size & (size - 1) == 0
                        assert config.num_warps * target.warp_size <= 1024
                        assert choose is launch.choose_loop or config.BLOCK_K >= classes
