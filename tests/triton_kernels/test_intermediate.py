"""Memory orders, barriers and widths of offsets in what Triton makes of the kernels, as they are written there."""

from pathlib import Path

import offline
import pytest

pytestmark = pytest.mark.thorough  # kernels are compiled


@pytest.fixture(scope="module")
def intermediate():
    return offline.in_a_process(str(Path(__file__).with_name("intermediate.py")))


PUBLISH, WAIT = "barrier release ", "acquire acquire barrier "  # what is written comes before, what is read behind
MEETINGS = {
    # the ticket; the first phase; the second, which waits for it; the last, which waits for both; the target's gradient
    "split_kernel": "relaxed " + PUBLISH + WAIT + PUBLISH + WAIT + WAIT + "barrier",
    **dict.fromkeys(("tile_kernel", "loop_kernel", "gradient_kernel"), "barrier"),  # before the target's gradient
}
NARROW = {  # what is far below 2^31, or comes last behind 64 bits
    "split_kernel": {"Counters_ptr", "Counters_ptr + more", "Loss_ptr", "Sums_ptr + more"},
    "tile_kernel": {"Loss_ptr"},
    "loop_kernel": {"Loss_ptr"},
    "gradient_kernel": {"LogQ_ptr", "LogQ_ptr + more"},
    "columns_kernel": {"Coefs_ptr + more", "Parts_ptr + more"},
    "add_kernel": {"Out_ptr", "Parts_ptr + more"},
    "sum_kernel": {"Out_ptr"},
    "row_weight_kernel": {"Out_ptr"},
    "scale_kernel": set(),
}

WIDENED = {  # sizes and strides, which the host passes in 32 bits only where they fit; offsets within one row
    "tile_kernel": {"v"},
    "loop_kernel": {"v"},
    "split_kernel": {"v", "sums"},
    "gradient_kernel": {"k0"},
    "scale_kernel": {"K", "so", "si", "out_so", "out_si"},
}


def test_programs_and_threads_meet_where_they_must(intermediate):
    for name, calls in intermediate.items():
        for call, found in calls.items():
            assert " ".join(found["meetings"]) == MEETINGS.get(name, ""), (name, call)


def test_offsets_have_64_bits(intermediate):
    assert set(intermediate) == set(NARROW)
    for name, calls in intermediate.items():
        for call, found in calls.items():
            assert set(found["narrow"]) <= NARROW[name], (name, call)
            assert set(found["widened"]) <= WIDENED.get(name, set()), (name, call)
