"""Tuning with a clock of the test's own: what wins, where it is kept, and what becomes of a file that is not ours."""

import json

import pytest
import torch

import anl_kernels as ak
from anl_kernels import layout
from anl_kernels.triton_kernels import autotune, launch

VIEW = launch.view_of((100, 5000, 1), 4, (5000, 1, 0))
FIRST = launch.LaunchConfig(BLOCK_N=1, BLOCK_K=1024, num_warps=4)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("ANL_KERNELS_CACHE", str(tmp_path / "new"))
    monkeypatch.setenv("ANL_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(layout, "_said", set())
    return tmp_path / "new" / "triton.json"


@pytest.fixture
def clock(monkeypatch):
    """Calls take as long as their classes' block is far from 2048; `timed` has what was run."""

    class Clock:
        def __init__(self):
            self.timed = []

        def __call__(self, run):
            run()
            return abs(self.timed[-1].BLOCK_K - 2048) + self.timed[-1].num_warps if self.timed else 1.0

    clock = Clock()
    monkeypatch.setattr(autotune, "milliseconds", clock)
    return clock


def tune(clock, kind="a kind"):
    return autotune.best(kind, autotune.candidates(FIRST, 5000), clock.timed.append)


def test_the_fastest_is_kept_and_timed_once(file, clock):
    won = tune(clock)
    assert won.BLOCK_K == 2048 and won.num_warps == 4 and clock.timed[0] == FIRST
    times = len(clock.timed)
    assert times == len(set(clock.timed)) > 3
    assert tune(clock) == won and len(clock.timed) == times
    autotune._known.clear()  # as another process would find it
    assert tune(clock) == won and len(clock.timed) == times
    assert json.loads(file.read_text()) == {"a kind": [1, 2048, 4, 1]}
    tune(clock, "another kind")
    assert len(clock.timed) == 2 * times and len(json.loads(file.read_text())) == 2
    assert list(file.parent.iterdir()) == [file]


NOT_OURS = ["", "{", "[1]", '{"a kind": 3}', '{"a kind": [1, 1000, 4, 1]}', '{"a kind": [1, 2048, 4, 1, 1]}']


@pytest.mark.parametrize("text", [*NOT_OURS, '{"a kind": ["1", 2048, 4, 1]}'])
def test_a_file_that_is_not_ours_is_replaced_with_a_word(text, file, clock, caplog):
    file.parent.mkdir()
    file.write_text(text)
    assert tune(clock).BLOCK_K == 2048 and len(clock.timed) > 3
    assert "tuned anew" in caplog.text
    assert json.loads(file.read_text()) == {"a kind": [1, 2048, 4, 1]}


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, file, clock, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANL_KERNELS_CACHE", str(tmp_path / "file"))
    assert tune(clock).BLOCK_K == 2048
    assert "not kept" in caplog.text


def test_another_process_loses_nothing(file, clock):
    tune(clock)
    ours = json.loads(file.read_text())
    file.write_text(json.dumps({**ours, "theirs": [2, 512, 4, 1]}))
    tune(clock, "another kind")
    assert set(json.loads(file.read_text())) == {"a kind", "theirs", "another kind"}


def test_kinds():
    kind = lambda **changes: autotune.kind_of(
        *({"kernel": "k", "view": VIEW, "dtype": torch.float32, "needs": 1, "device": "cuda:90"} | changes).values()
    )
    near = launch.view_of((101, 5004, 1), 4, (5004, 1, 0))
    assert kind() == kind(view=near)
    others = [dict(kernel="l"), dict(dtype=torch.bfloat16), dict(needs=0), dict(device="cuda:80")]
    others += [dict(view=launch.view_of((100, 9000, 1), 4, (9000, 1, 0))), dict(view=VIEW._replace(VEC=1))]
    assert len({kind(), *(kind(**other) for other in others)}) == 1 + len(others)


def test_candidates_of_rows_on_chip_hold_all_their_classes():
    for classes in (600, 1024):
        assert {config.BLOCK_K for config in autotune.candidates(FIRST, classes)} == {1024}


def test_nothing_is_timed_while_a_graph_is_captured(file, monkeypatch):
    assert autotune.enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not autotune.enabled()


def test_a_call_is_tuned_and_its_result_the_same(file, clock, device, monkeypatch):
    torch.manual_seed(0)
    logits, target = torch.randn(6, 600, device=device), torch.randint(600, (6,), device=device)
    results = []
    for setting in ("1", "1", "0"):
        monkeypatch.setenv("ANL_KERNELS_AUTOTUNE", setting)
        leaf = logits.clone().requires_grad_()
        loss = ak.anl_ce(leaf, target, backend="triton")
        loss.backward()
        results.append((loss.item(), leaf.grad))
        if len(results) == 1:
            kinds = json.loads(file.read_text())
            assert len(kinds) == 1 and next(iter(kinds)).startswith("tile_kernel 8x1024 1.4 torch.float32")
    for loss, grad in results:
        assert loss == pytest.approx(results[-1][0], rel=1e-6)
        torch.testing.assert_close(grad, results[-1][1], rtol=1e-5, atol=1e-9)


def test_a_gradient_over_the_logits_is_made_once(file, clock, device, monkeypatch):
    torch.manual_seed(0)
    logits, target = torch.randn(6, 600, device=device), torch.randint(600, (6,), device=device)
    grads = []
    for inplace in (True, False):
        leaf = logits.clone().requires_grad_()
        ak.anl_ce(leaf + 0.0, target, backend="triton", inplace=inplace).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-9)
