"""The emulated CUDA runtime refuses what CUDA refuses, with the error that CUDA gives, and no more than that."""

import subprocess

import cuda_on_host.build as build
import pytest
from cuda_on_host.adapter import DEVICES

KB = 1024
OK, INVALID_VALUE, INVALID_CONFIGURATION = "cudaSuccess", "cudaErrorInvalidValue", "cudaErrorInvalidConfiguration"
OUT_OF_RESOURCES, INVALID_CLUSTER = "cudaErrorLaunchOutOfResources", "cudaErrorInvalidClusterSize"
NOT_SUPPORTED, LAUNCH_FAILURE = "cudaErrorNotSupported", "cudaErrorLaunchFailure"


@pytest.fixture(scope="module")
def checks():
    if build.compiler() is None:
        pytest.skip("needs g++ on Linux and the source tree")
    program = build.build_program(build.HERE / "launch_checks.cpp")

    def run(device, what, **numbers):
        command = [program, str(DEVICES[device]), what, *(f"{name}={value}" for name, value in numbers.items())]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return run


def test_an_occupancy_in_clusters_needs_the_cluster(checks):
    """A cluster of one as any other: the attribute is what matters."""
    assert checks("host-h100", "occupancy")[0].split()[0] == INVALID_CLUSTER
    assert checks("host-h100", "occupancy", cluster=1)[0].split()[0] == OK


@pytest.mark.parametrize(
    ("device", "launch", "error"),
    [
        # blocks
        ("host-h100", dict(block=1024), OK),
        ("host-h100", dict(block=1025), INVALID_CONFIGURATION),
        ("host-h100", dict(block=32, block_y=33), INVALID_CONFIGURATION),
        ("host-h100", dict(block=1, block_z=65), INVALID_CONFIGURATION),
        ("host-h100", dict(block=0), INVALID_CONFIGURATION),
        ("host-h100", dict(block=1024, registers=65), OUT_OF_RESOURCES),
        ("host-h100", dict(block=512, registers=128), OK),
        ("host", dict(block=65), INVALID_CONFIGURATION),
        # grids
        ("host-h100", dict(grid=0), INVALID_CONFIGURATION),
        ("host-h100", dict(grid=2**31), INVALID_CONFIGURATION),
        ("host-h100", dict(grid_y=65536), INVALID_CONFIGURATION),
        ("host-h100", dict(grid_z=65536), INVALID_CONFIGURATION),
        ("host-h100", dict(grid_y=0), INVALID_CONFIGURATION),
        # shared memory
        ("host-h100", dict(shared=48 * KB), OK),
        ("host-h100", dict(shared=48 * KB + 1), INVALID_VALUE),
        ("host-h100", dict(shared=48 * KB + 1, ask=48 * KB + 1), OK),
        ("host-h100", dict(shared=227 * KB, ask=227 * KB), OK),
        ("host-h100", dict(ask=227 * KB + 1), INVALID_VALUE),
        ("host-a100", dict(ask=163 * KB + 1), INVALID_VALUE),
        ("host-rtx4090", dict(ask=99 * KB + 1), INVALID_VALUE),
        ("host", dict(shared=16 * KB + 1), INVALID_VALUE),
        # clusters
        ("host-h100", dict(cluster=8, grid=16), OK),
        ("host-h100", dict(cluster=3, grid=6), OK),
        ("host-h100", dict(cluster=3, grid=4), INVALID_CONFIGURATION),
        ("host-h100", dict(cluster=0, grid=4), INVALID_CLUSTER),
        ("host-h100", dict(cluster=9, grid=9), INVALID_CLUSTER),
        ("host-h100", dict(cluster=16, grid=16), INVALID_CLUSTER),
        ("host-h100", dict(cluster=16, grid=16, wide=1), OK),
        ("host-h100", dict(cluster=17, grid=17, wide=1), INVALID_CLUSTER),
        ("host-h100", dict(cluster=16, grid=16, wide=1, shared=200 * KB, ask=200 * KB), OK),
        ("host-h20", dict(cluster=16, grid=16, wide=1), INVALID_CLUSTER),
        ("host-mig", dict(cluster=16, grid=16, wide=1, shared=100 * KB, ask=200 * KB), OK),  # two a multiprocessor
        ("host-mig", dict(cluster=16, grid=16, wide=1, shared=200 * KB, ask=200 * KB), INVALID_CLUSTER),
        ("host-rtx5090", dict(cluster=8, grid=8), OK),
        ("host-rtx5090", dict(cluster=9, grid=9, wide=1), INVALID_CLUSTER),
        ("host-a100", dict(cluster=2, grid=2), NOT_SUPPORTED),
        ("host-rtx4090", dict(cluster=2, grid=2), NOT_SUPPORTED),
    ],
    ids=str,
)
def test_launches(checks, device, launch, error):
    assert checks(device, "launch", **launch) == [error]


@pytest.mark.parametrize(
    ("device", "query", "clusters", "widest", "blocks"),
    [
        ("host-h100", dict(cluster=1, block=256), 132 * 4, 8, 4),  # by registers
        ("host-h100", dict(cluster=1, block=1024, registers=32), 132 * 2, 8, 2),  # by threads
        ("host-h100", dict(cluster=1, block=32, registers=16), 132 * 32, 8, 32),
        ("host-h100", dict(cluster=1, block=256, shared=113 * KB, ask=113 * KB), 132 * 2, 8, 2),
        ("host-h100", dict(cluster=1, block=256, shared=114 * KB, ask=114 * KB), 132, 8, 1),  # 1 KB besides, each
        ("host-h100", dict(cluster=16, block=256, shared=200 * KB, ask=200 * KB, wide=1), 8, 16, 1),
        ("host-h200", dict(cluster=16, block=256, shared=200 * KB, ask=200 * KB, wide=1), 6, 16, 1),
        ("host-mig", dict(cluster=16, block=256, shared=200 * KB, ask=200 * KB, wide=1), 0, 8, 1),
        ("host-mig", dict(cluster=16, block=256, shared=100 * KB, ask=100 * KB, wide=1), 2, 16, 2),
        ("host-h100", dict(cluster=1, block=2048), 0, 0, 0),
        ("host-h100", dict(cluster=1, block=1024, registers=65), 0, 0, 0),
        ("host-h100", dict(cluster=1, shared=48 * KB + 1), 0, 0, 0),
        ("host-rtx5090", dict(cluster=8, wide=1), 510, 8, 24),
    ],
    ids=str,
)
def test_occupancy(checks, device, query, clusters, widest, blocks):
    """Clusters at a time, the largest cluster, CTAs a multiprocessor; 0: it does not fit."""
    assert checks(device, "occupancy", **query) == [f"{OK} {clusters} {widest} {blocks}"]


@pytest.mark.parametrize(
    ("device", "query", "error"),
    [
        ("host-h100", dict(cluster=16), INVALID_CLUSTER),
        ("host-h20", dict(cluster=16, wide=1), INVALID_CLUSTER),
        ("host-a100", dict(cluster=1), NOT_SUPPORTED),
    ],
    ids=str,
)
def test_occupancy_of_a_cluster_that_cannot_be(checks, device, query, error):
    assert checks(device, "occupancy", **query)[0].split()[0] == error


def test_static_shared_memory_is_known_when_a_kernel_has_run(checks):
    def known(what):
        static, dynamic, *_ = map(int, checks("host-h100", what, kernel="has_static_shared")[-1].split())
        return static, dynamic

    assert known("attributes") == (0, 48 * KB)
    assert known("launch_and_attributes") == (4 * KB, 44 * KB)


@pytest.mark.parametrize("room", [0, 1])
def test_static_and_dynamic_shared_memory_are_one(checks, room):
    """When it is first seen, and by then known."""
    least, most = (44 * KB, 223 * KB) if room == 0 else (44 * KB + 1, 223 * KB + 1)
    expected = INVALID_VALUE if room else OK
    launch = dict(kernel="has_static_shared", times=2)
    assert checks("host-h100", "launch", shared=least, **launch) == [expected] * 2
    assert checks("host-h100", "launch", shared=most, ask=227 * KB, **launch)[0] == expected
    assert checks("host-h100", "launch", shared=0, ask=most, **launch)[1] == expected


INSTRUCTIONS = 8


@pytest.mark.parametrize("which", range(INSTRUCTIONS))
def test_code_for_an_older_gpu_traps_at_what_that_does_not_have(checks, which):
    for device in ("host-a100", "host-h100-of-80"):
        assert checks(device, "launch", kernel="instruction", which=which, shared=1024) == [LAUNCH_FAILURE]


def test_every_instruction_of_sm_90_is_among_them(checks):
    assert checks("host-a100", "launch", kernel="instruction", which=INSTRUCTIONS) == [OK]


@pytest.mark.parametrize(
    ("device", "ptx", "binary"),
    [
        ("host-h100", 90, 90),
        ("host-a100", 80, 80),
        ("host-b200", 100, 100),
        ("host-rtx4090", 80, 80),
        ("host-rtx5090", 100, 120),
        ("host-h100-of-80", 80, 90),
    ],
)
def test_what_a_kernel_was_compiled_for(checks, device, ptx, binary):
    assert list(map(int, checks(device, "attributes")[1].split()))[-2:] == [ptx, binary]


def test_a_kernel_that_failed_has_broken_its_device(checks):
    """For every call but those on other devices, until the end of the process."""
    answers = checks("host-h100", "errors_that_stay")
    assert answers == [LAUNCH_FAILURE] * 8 + [OK] * 14


def test_a_refused_launch_has_broken_nothing(checks):
    answers = checks("host-h100", "errors_that_pass")
    assert answers == [INVALID_CONFIGURATION] * 3 + [OK] * 8


def test_contexts_are_made_by_what_makes_them(checks):
    """A bit for each device that has one; the current device."""
    assert checks("host", "contexts") == [
        "nothing 0 0",
        "get 0 0",
        "retain 2 0",
        "push 2 1",
        "launch 2 1",
        "current 1",
        "popped 1",
        "pop 2 0",
        "none 1 201",
        "set 6 2",
        "restored 6 2",
        "reset 0 0",
        "first 1 0",
        "cuCtxPushCurrent_v2: cudaSuccess, 1",
        "cudaErrorInvalidValue",
    ]
