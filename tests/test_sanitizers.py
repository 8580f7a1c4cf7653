"""The C++ sources of `_cpu`, compiled with sanitizers, on random shapes, strides, labels and values."""

from pathlib import Path

import backends_under_test
import pytest
from cuda_on_host import build, sanitizers

pytestmark = pytest.mark.thorough
PROGRAM = Path(__file__).with_name("support") / "sanitized_calls.py"


@pytest.mark.skipif(build.compiler() is None, reason="needs g++ on Linux and the source tree")
@pytest.mark.parametrize("isa", backends_under_test.runnable_isas())
def test_no_access_out_of_bounds_and_no_undefined_behaviour(isa):
    module = build.build_cpu("address")
    result = sanitizers.address(PROGRAM, module.parent, isa, 150)
    assert result.returncode == 0, result.stderr[:4000]
    assert result.stdout == f"clean: {isa}\n"
