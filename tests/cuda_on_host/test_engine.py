"""The engine that runs CUDA threads on the host: what it promises the kernels' tests, and what it must not let pass."""

import math
import subprocess

import cuda_on_host.build as build
import pytest


@pytest.fixture(scope="module")
def checks():
    if build.compiler() is None:
        pytest.skip("needs g++ on Linux and the source tree")
    program = build.build_program(build.HERE / "engine_checks.cpp")

    def run(name):
        result = subprocess.run([program, name], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        error, *numbers = result.stdout.split()
        return error, [float(x) for x in numbers], result.stderr

    return run


def test_a_copy_is_not_there_before_it_is_waited_for(checks):
    error, out, _ = checks("copies")
    assert error == "cudaSuccess"
    assert all(math.isnan(x) for x in out[0:128:2])
    assert out[1:128:2] == list(range(64))


def test_a_bulk_copy_completes_its_barrier(checks):
    error, out, _ = checks("bulk")
    assert error == "cudaSuccess" and out[:64] == list(range(64))


def test_fresh_shared_memory_is_nan(checks):
    error, out, _ = checks("shared_of_nobody")
    assert error == "cudaSuccess" and all(math.isnan(x) for x in out[:64])


def test_shuffles_and_votes(checks):
    error, out, _ = checks("shuffles")
    for thread in range(64):
        lane, warp = thread % 32, thread // 32
        votes = sum(t % 3 == 0 for t in range(32 * warp, 32 * warp + 32))
        assert out[thread] == sum(range(32 * warp, 32 * warp + 32)) + (thread ^ 1 if lane < 8 else 0) + votes
    assert error == "cudaSuccess"


def test_a_cluster_sees_its_neighbours_shared_memory(checks):
    error, out, _ = checks("neighbours")
    assert error == "cudaSuccess"
    assert out == [100 * ((cta + 1) % 4) + thread for cta in range(4) for thread in range(64)]


def test_ctas_run_in_no_particular_order(checks):
    error, out, _ = checks("order")
    assert error == "cudaSuccess"
    assert sorted(out[:40]) == list(range(40)) and out[:40] != list(range(40))


def test_a_launch_that_starts_early(checks):
    error, out, _ = checks("early")
    assert error == "cudaSuccess" and out[:64] == list(range(64))


@pytest.mark.parametrize(
    "name, message",
    [
        ("barrier_of_some", "a deadlock"),
        ("barriers_apart", "meet at different barriers"),
        ("past_the_end", "past its shared memory"),
        ("copy_not_waited_for", "ended before its asynchronous copies"),
        ("copy_of_unaligned", "no multiples of its unit"),
        ("bulk_too_little", "expect fewer bytes"),
        ("bulk_too_much", "a deadlock"),
        ("shuffle_from_nobody", "a lane that takes no part"),
        ("early_by_half", "has not waited for the one ahead"),
    ],
)
def test_what_is_undefined_on_a_device_fails_here(checks, name, message):
    error, _, stderr = checks(name)
    assert error == "cudaErrorLaunchFailure" and message in stderr
