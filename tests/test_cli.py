"""`python -m anl_kernels`: what its commands print, write and return."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import anl_kernels as ak
from anl_kernels import trust
from anl_kernels.__main__ import main
from anl_kernels.cli import bench, check, contenders, demo, info, timing, verify, workloads


def test_info(capsys):
    assert main(["info"]) == 0
    assert "reference" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert {"torch", "device", "backends", "cuda_module"} <= set(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("archs", "ptx_alone"), [("80+PTX", True), ("80+PTX;90+PTX", True), ("80;90;90+PTX", False), ("90", False)]
)
def test_info_says_where_the_driver_compiles_the_kernels(archs, ptx_alone):
    facts = {"archs": archs, "lean_kernels": True, "runtime": 13000, "driver": 0, "devices": []}
    text = "\n".join(info.cuda_module_lines(facts))
    assert f" {archs}" in text
    assert ptx_alone == ("the driver compiles them when they first run" in text)
    assert "only the kernels that run every loss" not in text
    assert "only the kernels that run every loss" in "\n".join(info.cuda_module_lines({**facts, "lean_kernels": False}))


def test_check_passes(capsys):
    there = [f"--backend={b.name}" for b in ak.backends() if b.available and b.name != "triton"]  # interpreted: minutes
    assert main(["check", *there, "--loss", "ANL-CE", "--loss", "RowLoss", "--dtype", "fp32"]) == 0
    assert "all within tolerance" in capsys.readouterr().out


def test_check_sees_a_wrong_loss(monkeypatch, capsys):
    wrong = check.Loss("CE", check.ak.cross_entropy, lambda z, y: 1.01 * check.formulas.cross_entropy(z, y))
    monkeypatch.setattr(check, "LOSSES", [wrong])
    assert main(["check", "--dtype", "fp64", "--backend", "reference"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_check_of_a_backend_that_is_not_there(capsys):
    well = ["--backend", "reference", "--loss", "CE", "--dtype", "fp64"]
    assert main(["check", "--backend", "abacus", *well]) == 1  # what goes well afterwards does not hide it
    output = capsys.readouterr().out
    assert "no such backend" in output and output.endswith("FAIL\n")


def test_check_of_every_loss_and_layout_against_the_reference():
    """The formulas and PyTorch's own operators in float64: nearer to one another than any tolerance for kernels."""
    found = list(check.rows_of("reference", check.LOSSES, ["fp64"]))
    assert {(row.loss, row.layout) for row in found} == {(l.name, n) for l in check.LOSSES for n in check.LAYOUTS}
    assert all(row.ok and max(row.errors) < 2e-13 for row in found)


def test_check_takes_every_way_to_a_gradient_and_tells_which_fails(monkeypatch):
    ways = []

    def compare(loss, backend, logits, target, expected, way):
        ways.append(way)
        if way == "none":
            raise ValueError("no loss per row")
        return check.Errors(0.0, 1.0 if way == "inplace" else 0.0)

    monkeypatch.setattr(check, "compare", compare)
    plain, entropy = check.LOSSES[0], next(loss for loss in check.LOSSES if loss.entropy_weight)
    for loss, backend, expected, failures in (
        (plain, "cpu", ["mean", "inplace", "recompute", "none"], 2),
        (plain, "reference", ["mean", "recompute", "none"], 1),
        (entropy, "cpu", ["mean", "inplace", "recompute"], 1),
    ):
        ways.clear()
        row = check.check_one(backend, loss, "fp32", "rows", *check.rows(torch.float32, 10, 5))
        assert ways == expected and len(row.failures) == failures and not row.ok
        assert ("none" in expected) == any("none: ValueError: no loss per row" in text for text in row.failures)


def test_check_sees_a_nan_and_an_error_in_any_row():
    nan = float("nan")
    for errors in (check.Errors(nan, 0.0), check.Errors(0.0, nan)):
        assert not errors.within("fp32") and not errors.worst(check.Errors()).within("fp32")
        assert not check.Errors().worst(errors).within("fp32")
    want = torch.tensor([[3.0, -1.0], [1e-3, 0.0]], dtype=torch.float64)
    nothing = torch.zeros(2, 1, dtype=torch.bool)
    assert check.gradient_error(want.float(), want, nothing) < 1e-7
    wrong = want.clone()
    wrong[1, 1] += 1e-2  # of a tenth of the largest
    assert check.gradient_error(wrong, want, nothing) == pytest.approx(1e-2 / 0.3)
    assert check.gradient_error(wrong, want, torch.tensor([[False], [True]])) == 0.0
    wrong[1, 1] = nan
    assert check.gradient_error(wrong, want, torch.tensor([[False], [True]])) != 0.0  # not even next to the clamp
    assert check.relative(torch.tensor([1.0, 0.11]), torch.tensor([1.0, 0.1])) == pytest.approx(0.1)


def test_protocols_are_verified_from_the_least_to_the_largest_size(monkeypatch):
    monkeypatch.setitem(verify.KERNEL_OF, "a.b", lambda rows, classes, dtype, device: "few" if rows < 5 else "many")
    monkeypatch.setattr(verify, "case", lambda rows, classes, dtype, device: (rows, classes, dtype))
    found = list(verify.cases("a.b", HERE))
    for dtype in (torch.float32, torch.bfloat16):
        for few in (True, False):
            sizes = [(rows, classes) for rows, classes, kind in found if kind is dtype and (rows < 5) == few]
            assert len(sizes) == verify.CASES
            possible = [(n, k) for k in verify.CLASSES for n in verify.ROWS if (n < 5) == few and n * k <= 1 << 24]
            assert sizes[0] == possible[0] and sizes[-1] == possible[-1]


def test_a_protocol_is_tried_every_way_with_every_loss(monkeypatch):
    calls = []

    def compare(loss, backend, logits, target, expected, way):
        calls.append((loss.name, backend, way))
        return check.Errors(grad=1.0 if way == "none" else 0.0)

    monkeypatch.setattr(check, "compare", compare)
    monkeypatch.setattr(verify, "cases", lambda protocol, device: [check.rows(torch.float32, 10, 5)])
    monkeypatch.setattr(verify, "same_bits", lambda loss, *call: loss.name != "ANL-FL")
    made, wrong = verify.failures("cuda.split", HERE)
    assert sorted(calls) == sorted((loss, "cuda", way) for loss in verify.LOSSES for way in ("mean", "inplace", "none"))
    assert made == len(verify.LOSSES) * (3 + verify.REPEATS) and len(wrong) == len(verify.LOSSES) + 1
    assert sum("other bits" in text for text in wrong) == 1 and sum(" none: error" in text for text in wrong) == 3


def test_times_are_quantiles():
    assert timing.Times.of([float(x) for x in reversed(range(21))]) == (10.0, 2.0, 18.0, 21)


def test_contenders_take_turns_and_are_restored_outside_the_clock(monkeypatch):
    """Each round begins with another one; `before` comes once before every call."""
    log = []

    class Clock:
        def __init__(self, device):
            pass

        def time(self, call, calls=1):
            log.append((call(), calls))
            return 1e-3

    monkeypatch.setattr(timing, "Clock", Clock)
    runs = [
        timing.Run(lambda: "a"),
        timing.Run(lambda: "b"),
        timing.Run(lambda: "c", before=lambda: log.append("before")),
    ]
    found = timing.interleaved(runs, 1000, 0.0, rounds=(3, 3))
    assert [t.samples for t in found] == [3, 3, 3] and all(t.median == pytest.approx(1e-3) for t in found)
    a, b, c = [("a", 2)], [("b", 2)], ["before", ("c", 1)] * 2  # 2 calls per sample of SMALL_SAMPLE
    first = [("a", 1)] * 2 + [("b", 1)] * 2 + c
    assert log == [*first, *a, *b, *c, *b, *c, *a, *c, *a, *b]


def test_bench_writes_what_it_measured(tmp_path, capsys):
    file = tmp_path / "bench.json"
    arguments = [
        "--shapes",
        "16x10,2x21x4x4:bf16",
        "--no-compile",
        "--seconds",
        "0.01",
        "--strict",
        "--json",
        str(file),
    ]
    assert main(["bench", *arguments]) == 0
    document = json.loads(file.read_text())
    assert {r["state"] for r in document["results"]} == {"ok"}
    assert len(document["results"]) == 2 * len(contenders.contenders("anl_ce", compile=False))


def test_bench_shows_a_wrong_contender_as_wrong():
    chosen = workloads.parse("16x10")[0]
    logits, target = chosen.tensors()
    found = contenders.contenders("anl_ce", compile=False)
    other = next(c for c in found if c.name == "F.cross_entropy")
    expected = contenders.truth(found[0].formula, logits, target)
    right, _ = contenders.verdict(other, logits, target, expected)
    assert not right
    measured = bench.Bench("cpu", 0.01, ("both",)).measure(chosen, [other._replace(formula=found[0].formula)])
    assert measured["both"][0]["state"] == "wrong" and "median_s" not in measured["both"][0]


def test_the_truth_of_a_contender_is_that_of_all_its_rows():
    logits, target = workloads.parse("7x10")[0].tensors()
    z = logits.double().requires_grad_()
    loss = check.formulas.nce(z, target).mean()
    (grad,) = torch.autograd.grad(loss, z)
    for chunk in (10, 35, 1000):
        found = contenders.truth(check.formulas.nce, logits, target, chunk)
        assert found.loss == pytest.approx(loss.item(), rel=1e-13)
        torch.testing.assert_close(found.grad, grad, rtol=1e-13, atol=1e-16)


def test_bench_measures_memory_exactly():
    logits, target = workloads.parse("64x1000")[0].tensors()
    found = timing.profile(contenders.cloning(logits, target, "both"))
    assert found.peak_bytes == logits.numel() * 4
    assert found.allocations == 1
    assert found.launches is None
    found = timing.profile(timing.Run(lambda: logits.clone().exp().sum()))  # of what is gone again, the most at a time
    assert found.peak_bytes == 2 * logits.nbytes and found.allocations == 3


@pytest.mark.thorough
@pytest.mark.parametrize("what, more", [("peak_bytes", 1 << 30), ("allocations", 10), ("launches", 100)])
def test_bench_reports_a_broken_promise(monkeypatch, capsys, what, more):
    def greedy(run, device):
        return timing.profile(run, device)._replace(**{what: more})

    monkeypatch.setattr(bench, "profile", greedy)
    assert main(["bench", "--shapes", "16x10", "--no-compile", "--seconds", "0.01", "--strict"]) == 1
    assert "promised" in capsys.readouterr().err


@pytest.mark.thorough
def test_bench_times_each_phase(tmp_path):
    file = tmp_path / "bench.json"
    options = ["--shapes", "16x10", "--no-compile", "--seconds", "0.01", "--phase", "all", "--json", str(file)]
    assert main(["bench", *options]) == 0
    assert {r["phase"] for r in json.loads(file.read_text())["results"]} == set(contenders.PHASES)


@pytest.mark.parametrize("text", ["10", "axb", "0x5", "4x4:int8"])
def test_bench_rejects_what_is_no_shape(text):
    with pytest.raises(SystemExit) as end:
        main(["bench", "--shapes", text])
    assert "no workload" in str(end.value)


def test_demo(tmp_path, capsys):
    pytest.importorskip("sklearn"), pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    small = ["--seeds", "1", "--epochs", "2", "--workers", "1", "--losses", "CE,ANL-CE+entropy"]
    assert main(["demo", *small, "--output", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    for text in ("ANL-CE+entropy", "last epoch", "best epoch", "lowest recall", "recall in %, last epoch", "one seed"):
        assert text in output
    assert "±" not in output


def jobs_of_the_demo(losses, seeds=(0, 1), epochs=2):
    images, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    runs = {loss: [demo.Run(noise, loss, seed) for noise in demo.NOISES for seed in seeds] for loss in losses}
    return [demo.Job(runs[loss], epochs, "auto", images, labels) for loss in losses]


def test_demo_trains_networks_side_by_side_as_if_alone():
    networks, x = [demo.seeded_network(seed) for seed in (3, 4)], 50 * torch.rand(2, 30, 64)
    together = demo.Networks(networks)
    logits, factors = together(x), (1e3, 1e-3)  # the first gradient is clipped, the second is not
    (logits * torch.tensor(factors).view(2, 1, 1)).sum().backward()
    together.clip_gradients()
    for run, alone in enumerate(networks):
        logits_alone = alone(x[run])
        torch.testing.assert_close(logits[run], logits_alone)
        (logits_alone * factors[run]).sum().backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), demo.CLIP)
        expected = torch.cat([weight.grad.flatten() for weight in alone.parameters()])
        torch.testing.assert_close(together.weights.grad[run], expected, rtol=1e-3, atol=1e-4)
    together.eval()
    for run, alone in enumerate(networks):  # by the statistics of that batch
        torch.testing.assert_close(together(x)[run], alone.eval()(x[run]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", ["ANL-CE", "ANL-CE+entropy"])
def test_demo_sums_the_losses_of_its_runs(loss):
    setting, logits, labels = demo.SETTINGS[loss], torch.randn(3, 17, 10), torch.randint(10, (3, 17))
    options = {"entropy_weight": setting.entropy_weight, "backend": "reference"}
    expected = sum(setting.criterion(z, y, **options) for z, y in zip(logits, labels))
    torch.testing.assert_close(demo.sum_of_losses(setting, logits, labels, "auto"), expected)


@pytest.mark.thorough
def test_demo_gives_the_same_results_with_any_number_of_workers():
    jobs = jobs_of_the_demo(["CE", "ANL-CE+entropy"])
    assert demo.run_all(jobs, 1) == demo.run_all(jobs, 2)


def test_demo_reports_last_and_best_epoch_and_the_lowest_recall():
    first, second = demo.Curve([0.0], [90.0, 70.0], [50.0] * 9 + [4.0]), demo.Curve([0.0], [80.0, 74.0], [6.0] * 10)
    found = {demo.Run(noise, "CE", seed): curve for noise in demo.NOISES for seed, curve in ((0, first), (1, second))}
    assert demo.report(found, ["CE"]).count("72.0 ± 2.8") == 2  # the sample standard deviation
    assert demo.report(found, ["CE"]).count("85.0 ± 7.1") == 2
    assert demo.report(found, ["CE"]).count("5.0 ± 1.4") == 2
    assert demo.report_recall(found, ["CE"]).splitlines()[-1].split()[-2:] == ["28", "5"]
    del found[demo.Run("symmetric 60 %", "CE", 1)]
    assert "70.0  " in demo.report(found, ["CE"])


def test_demo_measures_recall_per_digit():
    (curves,) = [demo.train(job) for job in jobs_of_the_demo(["CE"], seeds=(0,), epochs=3)]
    for curve in curves.values():
        assert len(curve.train) == len(curve.test) == 3 and len(curve.recall) == 10
        assert min(curve.recall) - 1e-3 <= curve.test[-1] <= max(curve.recall) + 1e-3  # a mean of them


@pytest.mark.parametrize(("command", "option"), [("bench", "--json"), ("demo", "--output")])
@pytest.mark.parametrize("name", ["no/such/folder/file.png", "."])
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, capsys, command, option, name):
    if command == "demo":
        pytest.importorskip("sklearn"), pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as end:
        main([command, option, str(tmp_path / name)])
    output = capsys.readouterr()
    assert end.value.code == 2
    assert option in output.err and "folder" in output.err and output.out == ""


def test_demo_refuses_what_is_no_plot(tmp_path, capsys):
    pytest.importorskip("sklearn"), pytest.importorskip("matplotlib")
    assert main(["demo", "--output", str(tmp_path / "plot.txt")]) == 2
    assert "png" in capsys.readouterr().err


# ---- check on a GPU that is emulated

HERE = torch.device("cpu")


@pytest.fixture
def emulated(tmp_path, monkeypatch):
    """use(device): what `check` starts has that device of the emulation; nothing is remembered yet."""
    from cuda_on_host import adapter, build

    if build.compiler() is None or torch.cuda.is_available():
        pytest.skip("needs g++ on Linux, the source tree and no GPU")
    monkeypatch.setenv("ANL_KERNELS_CACHE", str(tmp_path))
    trust._trusted.cache_clear()
    script = Path(adapter.__file__).with_name("cli.py")
    use = lambda device: monkeypatch.setattr(verify, "COMMAND", [sys.executable, str(script), device])
    use("host")
    with adapter.on_host("host"):
        yield use
    trust._trusted.cache_clear()


def test_info_says_which_protocols_are_used(emulated, capsys):
    trust.record("cuda.split", HERE, {})
    assert main(["info"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    states = {line[0]: line[1].rstrip(",") for line in lines if line and line[0].startswith("cuda.")}
    assert states == {"cuda.tickets": "no", "cuda.split": "yes", "cuda.cluster": "no"}


def remembered():
    return {key.split(" on ")[0] for key in trust.FILE.read()}


@pytest.mark.thorough
def test_check_verifies_a_gpus_protocols_and_remembers(emulated, capsys, monkeypatch):
    arguments = ["check", "--backend", "cuda", "--loss", "CE", "--dtype", "fp32"]
    assert main(arguments) == 0
    assert re.search("cuda.cluster +verified +remembered", capsys.readouterr().out)
    assert remembered() == {"cuda.tickets", "cuda.split", "cuda.cluster"}
    assert trust.trusted("cuda", HERE, explicit=False) == {"tickets", "split", "cluster"}
    monkeypatch.setattr(verify, "verify", lambda protocol, device: ("verified", "now"))
    lines, failed = verify.report("cuda", again=False)
    assert not failed and [line[2] for line in lines] == ["now", "before", "before", "before"]
    assert [line[2] for line in verify.report("cuda", again=True)[0]] == ["now"] * 4


@pytest.mark.thorough
def test_a_protocol_that_a_gpu_never_uses(emulated):
    emulated("host-sm80")
    assert verify.verify("cuda.cluster", HERE) == ("never used", "no call on this GPU takes it")
    assert remembered() == set()


@pytest.mark.parametrize(
    ("device", "seconds", "reason"), [("dies", 60, "ended by SIGABRT"), ("hangs", 5, "no answer in 5 s")]
)
def test_a_protocol_that_hangs_or_kills_costs_its_process_only(emulated, device, seconds, reason):
    trust.record("cuda.split", HERE, {})
    emulated(device)
    assert verify.verify("cuda.split", HERE, seconds=seconds) == ("FAIL", reason)
    assert remembered() == set() and trust.trusted("cuda", HERE, explicit=False) == set()


@pytest.mark.thorough
def test_a_protocol_that_is_wrong_is_not_trusted(emulated, monkeypatch, capsys):
    for name, few in (("CLASSES", (3001,)), ("ROWS", (24,)), ("LOSSES", ("ANL-CE",)), ("DTYPES", ("fp32",))):
        monkeypatch.setattr(verify, name, few)
    assert verify.run_here("cuda.cluster", HERE) == 0
    with monkeypatch.context() as patch:
        patch.setattr(check, "TOLERANCE", dict.fromkeys(check.TOLERANCE, (1e-12, 1e-12)))
        assert verify.run_here("cuda.cluster", HERE) == 1
    assert "error" in capsys.readouterr().out
    monkeypatch.setattr(verify, "same_bits", lambda *call: False)
    assert verify.run_here("cuda.cluster", HERE) == 1
    assert "other bits when it is repeated" in capsys.readouterr().out
