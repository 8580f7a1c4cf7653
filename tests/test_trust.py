"""What was verified is remembered, and trusted where it was; what a file in the cache folder may do meanwhile."""

import logging

import pytest
import torch

from anl_kernels import cache, layout, trust
from anl_kernels.cli import verify

HERE = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache folder, in which there is nothing yet; nothing was logged."""
    monkeypatch.setenv("ANL_KERNELS_CACHE", str(tmp_path / "new"))
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    monkeypatch.setattr(layout, "_said", set())
    trust._trusted.cache_clear()
    yield tmp_path / "new"
    trust._trusted.cache_clear()


def trusted():
    return trust.trusted("cuda", HERE, explicit=False)


def test_what_is_recorded_is_trusted_at_once_and_until_it_is_forgotten():
    assert trusted() == set()
    for name in ("tickets", "split"):
        assert trust.record(f"cuda.{name}", HERE, {"date": "today"})
    assert trusted() == {"tickets", "split"}  # one beside the other
    trust.forget("cuda.tickets", HERE)
    assert trusted() == {"split"} and len(trust.FILE.read()) == 1
    assert trust.trusted("cuda", HERE, explicit=True) == {"tickets", "split", "cluster"}


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(trust, "device_name", lambda device: "another GPU"),
        lambda patch: patch.setattr(trust, "arch_of", lambda device: "sm_100"),
        lambda patch: patch.setattr("anl_kernels.__version__", "99"),
    ],
    ids=["device", "architecture", "version"],
)
def test_what_was_verified_elsewhere_is_not_verified_here(monkeypatch, change):
    trust.record("cuda.split", HERE, {})
    assert trust.is_verified("cuda.split", HERE)
    change(monkeypatch)
    assert not trust.is_verified("cuda.split", HERE)


def test_what_is_not_verified_is_said_once(caplog):
    with caplog.at_level(logging.WARNING, "anl_kernels"):
        for _ in range(3):
            trusted()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "tickets, split, cluster" in line and "python -m anl_kernels check" in line
    caplog.clear()
    trust.record("cuda.split", HERE, {})
    with caplog.at_level(logging.WARNING, "anl_kernels"):
        trusted()
    assert "tickets, cluster" in caplog.text


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, ("verified", "remembered")),
        (1, ("FAIL", "why")),
        (-6, ("FAIL", "why")),
        (None, ("FAIL", "why")),
        (verify.NEVER_USED, ("never used", "why")),
    ],
    ids=str,
)
def test_a_protocol_is_remembered_if_its_process_ends_well_and_forgotten_if_not(monkeypatch, code, expected):
    seen = []

    def process(arguments, seconds, **environment):
        seen.append((arguments, environment))
        return verify.Outcome(code, "7 calls", "why")

    monkeypatch.setattr(verify, "in_a_process", process)
    for before in (False, True):
        if before:
            trust.record("cuda.split", HERE, {})
        assert verify.verify("cuda.split", HERE) == expected
        assert trusted() == ({"split"} if code == 0 else set())
    arguments, environment = seen[0]
    assert arguments == ["check", "--here", "--protocol", "cuda.split", "--device", "cpu"]
    assert environment == {trust.VARIABLE: "cuda.split"}  # no other takes part
    if code == 0:
        assert [facts["cases"] for facts in trust.FILE.read().values()] == ["7 calls"]
    trust.record("cuda.split", HERE, {})
    assert verify.verify("cuda.launches", HERE)[0] == expected[0]
    assert seen[-1][1] == {trust.VARIABLE: "none"} and trusted() == {"split"}


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "\0"], ids=repr)
def test_a_file_that_is_not_ours_counts_as_none(folder, caplog, text):
    folder.mkdir()
    trust.FILE.path.write_text(text)
    assert trust.FILE.read() == {} and trusted() == set()
    assert "protocols count as not verified" in caplog.text
    assert trust.record("cuda.split", HERE, {}) and trusted() == {"split"}
    assert [path.name for path in folder.iterdir()] == ["verified.json"]  # and nothing half written


def test_a_folder_that_cannot_be_written_is_told(folder, caplog):
    folder.write_text("a file where the folder should be")
    assert not trust.record("cuda.split", HERE, {})
    assert "what was verified is not remembered" in caplog.text and trusted() == set()


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {}, "{home}/.cache/anl_kernels"),
        ("linux", {"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere/anl_kernels"),
        ("linux", {"XDG_CACHE_HOME": ""}, "{home}/.cache/anl_kernels"),
        ("darwin", {}, "{home}/Library/Caches/anl_kernels"),
        ("linux", {"ANL_KERNELS_CACHE": "/named"}, "/named"),
    ],
)
def test_the_folder(monkeypatch, tmp_path, system, variables, expected):
    for name in ("ANL_KERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(cache.sys, "platform", system)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache.folder()) == expected.format(home=tmp_path)
