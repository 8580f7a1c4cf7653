"""The plan of a call follows the device's limits: the kernels on further devices, and that all of them take part."""

import helpers
import oracle
import pytest
import torch
from cuda_on_host import adapter, build

pytestmark = pytest.mark.skipif(
    build.compiler() is None or torch.cuda.is_available(), reason="needs g++ on Linux and the source tree, and no GPU"
)


@pytest.mark.parametrize(
    "device, rows, classes, kernel",
    [
        ("host", 24, 37, "rows_small"),
        ("host", 24, 403, "rows_block"),
        ("host", 24, 3001, "rows_cluster"),
        ("host", 1, 5003, "rows_split"),
        ("host-sm80", 24, 37, "rows_small"),
        ("host-sm80", 24, 403, "rows_block"),
        ("host-sm80", 24, 3001, "rows_split"),
        ("host-h100", 4096, 1000, "rows_small"),
        ("host-h100", 4096, 5000, "rows_block"),
        ("host-h100", 4096, 100_000, "rows_cluster"),
        ("host-a100", 4096, 100_000, "rows_split"),
    ],
)
def test_every_kernel_takes_part(device, rows, classes, kernel):
    float32 = 0
    with adapter.on_host(device) as module:
        shape = (rows, classes, 1)
        assert module.plan_for(float32, shape, (classes, 1, 0), -1)["kernel"] == kernel
        assert module.plan_for(float32, shape, (1, rows + 1, 0), -1)["kernel"] == "spatial"


@pytest.mark.parametrize("device", ["host-warp", "host-h100", "host-a100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=helpers.dtype_id)
@pytest.mark.parametrize("layout", ["rows", "offset", "transposed"])
def test_on_a_further_device(device, dtype, layout):
    for classes, name in ((3, "anl_fl"), (100, "anl_ce"), (1001, "nce+rce"), (2051, "anl_ce")):
        values, labels = helpers.batch(classes, dtype)
        logits, target = helpers.lay_out(layout, values, labels)
        terms = helpers.EXPRESSIONS[name]
        true = helpers.truth(values, labels, terms)
        for recompute in (False, True):
            with adapter.on_host(device):
                loss, grad = helpers.calculate(
                    logits, target, helpers.expression(terms), backend="cuda", recompute=recompute
                )
            helpers.assert_as_accurate(loss, oracle.as_rows(grad), labels, true)
