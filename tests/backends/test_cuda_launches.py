"""Launches: what is refused falls to the next plan and then to the next backend; what nobody trusts is not launched."""

import ctypes
import logging

import cuda_on_host.build
import helpers
import pytest
import torch
from helpers import EXPRESSIONS

import anl_kernels as ak
from anl_kernels import layout, registry, trust
from anl_kernels.backends import LaunchRefused, cuda, triton

pytestmark = pytest.mark.skipif(
    not cuda_on_host.build.compiler() or torch.cuda.is_available(),
    reason="needs g++ on Linux, the source tree and no GPU",
)
INVALID_CONFIGURATION, INVALID_CLUSTER_SIZE, LAUNCH_FAILURE = 9, 912, 719


@pytest.fixture
def host(monkeypatch):
    """The emulated device's library; messages are logged anew, and `auto` takes the GPU's backends for CPU tensors."""
    from cuda_on_host import adapter

    monkeypatch.setattr(layout, "_said", set())
    monkeypatch.setitem(registry.FUSED_BY_DEVICE, "cpu", ("cuda", "triton"))
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    monkeypatch.delenv("ANL_KERNELS_BACKEND", raising=False)
    library = adapter.loaded()[1]
    trust._trusted.cache_clear()
    with adapter.on_host("host"):
        library.anl_host_launches()
        library.anl_host_protocol_uses()
        yield library
        library.anl_host_refuse(b"", 0)
    trust._trusted.cache_clear()


def problem(rows=24, classes=3001, dtype=torch.float32):
    g = helpers.generator(classes)
    return (torch.randn(rows, classes, generator=g) * 4).to(dtype), torch.randint(classes, (rows,), generator=g)


def run(logits, target, terms="anl_ce", **keywords):
    leaf = logits.clone().requires_grad_()
    loss = ak.robust_loss(leaf * 1, target, helpers.expression(EXPRESSIONS[terms]), **keywords)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad


def is_right(result, logits, target, terms="anl_ce"):
    helpers.assert_as_accurate(*result, target, helpers.truth(logits, target, EXPRESSIONS[terms]))


# ---- what CUDA refuses


@pytest.mark.parametrize("error", [INVALID_CONFIGURATION, INVALID_CLUSTER_SIZE, 1, 98, 209, 218, 222, 701, 801])
def test_a_refused_launch_falls_to_the_next_plan(host, caplog, error):
    logits, target = problem()
    host.anl_host_refuse(b"01", error)  # prepare, rows_cluster
    with caplog.at_level(logging.WARNING, "anl_kernels"):
        is_right(run(logits, target, backend="cuda"), logits, target)
    assert "refuses to launch rows_cluster" in caplog.text and "rows_block runs instead" in caplog.text


@pytest.mark.parametrize("inplace", [False, True])
def test_plans_follow_one_another_until_none_is_left(host, inplace):
    """cluster, block where a row fits one, split, spatial; with the logits as they were."""
    logits, target = problem(classes=9001)

    def plans(classes, protocols):
        plan = cuda.plan_for(24, classes, torch.float32, logits.device, protocols)
        return [plan["kernel"], *plan["next"]]

    assert plans(37, ()) == ["rows_small", "rows_block", "rows_split", "spatial"]
    assert plans(3001, ("cluster",)) == ["rows_cluster", "rows_block", "rows_split", "spatial"]
    assert plans(9001, ("cluster",)) == ["rows_cluster", "rows_split", "spatial"]
    for refused in (b"01", b"0101"):  # prepare, and the kernel
        host.anl_host_refuse(refused, INVALID_CONFIGURATION)
        is_right(run(logits, target, backend="cuda", inplace=inplace), logits, target)
    host.anl_host_refuse(b"01011", INVALID_CONFIGURATION)  # the last has one CTA, and needs no prepare
    with pytest.raises(LaunchRefused, match=r"rows_cluster \(.*rows_split \(.*spatial \("):
        run(logits, target, backend="cuda", inplace=inplace)


def test_it_is_said_once(host, caplog):
    logits, target = problem()
    for _ in range(3):
        host.anl_host_refuse(b"01", INVALID_CONFIGURATION)
        run(logits, target, backend="cuda")
    assert caplog.text.count("refuses to launch") == 1


def test_an_error_that_is_no_refusal_is_raised(host):
    """After it nothing can be trusted to run, and nothing else is tried."""
    host.anl_host_refuse(b"01", LAUNCH_FAILURE)
    with pytest.raises(RuntimeError, match=r"rows_block failed: .*cudaErrorLaunchFailure") as raised:
        run(*problem(), backend="auto")
    assert not isinstance(raised.value, LaunchRefused)


ALL = b"1" * 64


def test_auto_goes_on_to_the_next_backend(host, caplog):
    pytest.importorskip("triton")
    logits, target = problem(rows=5, classes=40)
    host.anl_host_refuse(ALL, INVALID_CONFIGURATION)
    is_right(run(logits, target), logits, target)
    assert "refuses to launch rows_small" in caplog.text and "the triton backend runs it" in caplog.text


@pytest.mark.parametrize("keywords", [{}, dict(recompute=True), dict(entropy_weight=0.5)], ids=str)
def test_auto_ends_at_the_reference(host, caplog, monkeypatch, keywords):
    monkeypatch.setattr(triton, "unavailable", lambda: "not here")
    logits, target = problem(rows=5, classes=40)
    expected = run(logits, target, backend="reference", **keywords)
    host.anl_host_refuse(ALL, INVALID_CONFIGURATION)
    for got, want in zip(run(logits, target, **keywords), expected):
        torch.testing.assert_close(got, want)
    assert "the reference backend runs it" in caplog.text


def test_a_gradient_that_is_refused_in_backward(host, caplog, monkeypatch):
    monkeypatch.setattr(triton, "unavailable", lambda: "not here")
    logits, target = problem(rows=5, classes=40)
    leaf = logits.requires_grad_()
    loss = ak.anl_ce(leaf, target, recompute=True)
    host.anl_host_refuse(ALL, INVALID_CONFIGURATION)
    loss.backward()
    is_right((loss.detach(), leaf.grad), logits.detach(), target)
    assert "the reference backend runs it" in caplog.text


def test_a_linear_head(host, caplog, monkeypatch):
    monkeypatch.setattr(triton, "unavailable", lambda: "not here")
    g = helpers.generator(3)
    hidden, weight = torch.randn(5, 8, generator=g), torch.randn(40, 8, generator=g).requires_grad_()
    target = torch.arange(5)
    wanted = torch.autograd.grad(ak.anl_ce(hidden @ weight.t(), target, backend="reference"), weight)[0]
    host.anl_host_refuse(ALL, INVALID_CONFIGURATION)
    (got,) = torch.autograd.grad(ak.linear_anl_ce(hidden, weight, target), weight)
    torch.testing.assert_close(got, wanted)
    assert "made in full" in caplog.text
    with pytest.raises(LaunchRefused, match="rows_small"):
        ak.linear_anl_ce(hidden, weight, target, backend="cuda")


@pytest.mark.parametrize("keywords", [{}, dict(recompute=True), dict(inplace=True)], ids=str)
def test_a_triton_kernel_that_does_not_fit(monkeypatch, caplog, keywords):
    """Triton finds out when it loads a kernel, before it is launched."""
    pytest.importorskip("triton")
    from triton.runtime.errors import OutOfResources

    from anl_kernels.triton_kernels import launch

    def refuse(kernel, *arguments):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(layout, "_said", set())
    monkeypatch.setitem(registry.FUSED_BY_DEVICE, "cpu", ("triton",))
    monkeypatch.setattr(registry, "_chosen", {})
    logits, target = problem(rows=5, classes=40)
    triton._kernels()  # all are imported before, so that none keeps what takes the launch's place here
    monkeypatch.setattr(launch, "launch", refuse)
    with pytest.raises(LaunchRefused, match="refuses to launch tile_kernel: out of resource: shared memory"):
        run(logits, target, backend="triton", **keywords)
    if "inplace" in keywords:  # the reference keeps the logits
        with pytest.raises(LaunchRefused, match="tile_kernel"):
            run(logits, target, **keywords)
    else:
        is_right(run(logits, target, **keywords), logits, target)
        assert "tile_kernel" in caplog.text and "the reference backend runs it" in caplog.text


def test_a_named_backend_is_never_left(host):
    logits, target = problem(rows=5, classes=40)
    host.anl_host_refuse(ALL, INVALID_CONFIGURATION)
    with pytest.raises(LaunchRefused, match="rows_small"):
        run(logits, target, backend="cuda")


# ---- what nobody has verified

SHAPES = [(4096, 10), (24, 37), (24, 403), (24, 3001), (3, 9001), (1, 5003)]  # every kernel, and several CTAs


@pytest.mark.parametrize("terms", ["anl_ce", "anl_fl", "ce"])
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_auto_uses_no_protocol_that_is_not_verified(host, caplog, tmp_path, monkeypatch, rows, classes, terms):
    monkeypatch.setenv("ANL_KERNELS_CACHE", str(tmp_path))
    trust._trusted.cache_clear()
    logits, target = problem(rows, classes)
    result = run(logits, target, terms)
    assert host.anl_host_protocol_uses() == 0
    is_right(result, logits, target, terms)
    assert "check" in caplog.text and "tickets, split, cluster" in caplog.text
    run(logits, target, terms, backend="cuda")
    assert host.anl_host_protocol_uses() > 0 or rows * classes < 1000, "this shape shows nothing"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("terms", ["anl_ce", "anl_fl", "ce"])
@pytest.mark.parametrize(
    ("rows", "classes", "device"), [(24, 37, "host"), (24, 403, "host"), (3, 9001, "host-sm80"), (5, 3001, "host-sm80")]
)
def test_launches_of_their_own_give_the_same_bits(host, monkeypatch, rows, classes, device, terms, reduction):
    from cuda_on_host import adapter

    logits, target = problem(rows, classes)
    target[rows // 2] = -100
    with adapter.on_host(device):
        results, launches = [], []
        for value in ("all", "none"):
            monkeypatch.setenv(trust.VARIABLE, value)
            host.anl_host_launches()
            results.append(run(logits, target, terms, backend="cuda", reduction=reduction))
            launches.append(host.anl_host_launches())
    for one, other in zip(*results):
        assert torch.equal(one, other)
    assert launches[1] >= launches[0]


@pytest.mark.parametrize(("terms", "launches"), [("ce", 6), ("anl_ce", 8)])
def test_the_launches_of_a_split_row(host, monkeypatch, terms, launches):
    """prepare, first sweep, merge, (second sweep, merge,) gradient, the sum of the loss; in backward the scale."""
    monkeypatch.setenv(trust.VARIABLE, "none")
    host.anl_host_launches()
    run(*problem(5, 9001), terms, backend="cuda")
    assert host.anl_host_launches() == launches


@pytest.mark.parametrize(("dtype", "classes"), [(torch.float32, 57_000), (torch.bfloat16, 115_000)])
def test_rows_that_one_cta_holds_are_read_once(dtype, classes):
    """On an H200 without protocols, as README says."""
    from cuda_on_host import adapter

    with adapter.on_host("host-h200"):
        device = torch.device("cpu")
        assert cuda.plan_for(4096, classes, dtype, device, ())["kernel"] == "rows_block"
        assert cuda.plan_for(4096, classes + 1000, dtype, device, ())["kernel"] == "rows_split"


def test_what_is_verified_is_used(host, tmp_path, monkeypatch):
    monkeypatch.setenv("ANL_KERNELS_CACHE", str(tmp_path))
    device = torch.device("cpu")
    logits, target = problem()
    for name, kernel in (("split", "rows_split"), ("cluster", "rows_cluster")):
        trust.record(f"cuda.{name}", device, {})
        allowed = trust.trusted("cuda", device, explicit=False)
        assert name in allowed and cuda.plan_for(24, 3001, torch.float32, device, allowed)["kernel"] == kernel
        is_right(run(logits, target), logits, target)
        assert host.anl_host_protocol_uses() > 0
    trust.forget("cuda.cluster", device)
    assert trust.trusted("cuda", device, explicit=False) == {"split"}


def test_one_cluster_runs_where_two_were_planned_for(host, monkeypatch):
    """It then writes the loss itself: there are no parts to add up, with tickets or by a launch."""
    logits, target = problem(classes=1251)
    for protocols in ("cuda.cluster", "cuda.cluster,cuda.tickets"):
        monkeypatch.setenv(trust.VARIABLE, protocols)
        trust._trusted.cache_clear()
        plan = cuda.plan_for(24, 1251, torch.float32, logits.device, ("cluster",))
        assert (plan["kernel"], plan["cluster"], plan["blocks"]) == ("rows_cluster", 4, 8)
        is_right(run(logits, target), logits, target)
        assert host.anl_host_protocol_uses() > 0


def test_another_version_has_to_prove_itself_again(host, tmp_path, monkeypatch):
    monkeypatch.setenv("ANL_KERNELS_CACHE", str(tmp_path))
    device = torch.device("cpu")
    trust.record("cuda.split", device, {})
    assert trust.is_verified("cuda.split", device) and not trust.is_verified("triton.split", device)
    monkeypatch.setattr(trust, "versions_of", lambda protocol: {"anl_kernels": "another"})
    assert not trust.is_verified("cuda.split", device)


def test_the_table_that_is_shipped(monkeypatch, tmp_path):
    monkeypatch.setenv("ANL_KERNELS_CACHE", str(tmp_path))
    device = torch.device("cpu")
    verified = trust.Verified("cpu", "cuda.split", trust.versions_of("cuda.split"))
    assert not trust.is_verified("cuda.split", device)
    monkeypatch.setattr(trust, "SHIPPED", (verified,))
    assert trust.is_verified("cuda.split", device) and not trust.is_verified("cuda.cluster", device)
    monkeypatch.setattr(trust, "SHIPPED", (verified._replace(arch="sm_90"),))
    assert not trust.is_verified("cuda.split", device)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("all", {"tickets", "split", "cluster"}), ("none", set()), ("cuda.split, triton.split", {"split"})],
)
def test_the_variable_overrides_all(monkeypatch, value, expected):
    monkeypatch.setenv(trust.VARIABLE, value)
    for explicit in (False, True):
        assert trust.trusted("cuda", torch.device("cpu"), explicit) == expected


def test_a_variable_that_names_nothing(monkeypatch):
    monkeypatch.setenv(trust.VARIABLE, "cuda.spilt")
    with pytest.raises(ValueError, match="'cuda.spilt' is not one of cuda.tickets, "):
        trust.trusted("cuda", torch.device("cpu"), explicit=True)


def test_a_backend_that_the_environment_names_is_trusted(host, monkeypatch):
    logits, target = problem()
    monkeypatch.setenv("ANL_KERNELS_BACKEND", "cuda")
    run(logits, target)
    assert host.anl_host_protocol_uses() > 0


def test_compiled_calls_know_whether_a_backend_was_named(host):
    logits, target = problem(24, 403)
    for backend, uses in (("auto", False), ("cuda", True)):
        compiled = torch.compile(
            lambda z, y, name=backend: ak.anl_ce(z, y, backend=name), fullgraph=True, backend="aot_eager"
        )
        loss = compiled(logits, target)
        assert (host.anl_host_protocol_uses() > 0) == uses
        torch.testing.assert_close(loss, ak.anl_ce(logits, target, backend="reference"))


def test_the_library_is_the_modules(host):
    """What is counted and refused here is what the module launches."""
    assert isinstance(host, ctypes.CDLL)
    host.anl_host_launches()
    run(*problem(4, 10), backend="cuda")
    assert host.anl_host_launches() == 2  # the kernel, and in backward the scale
