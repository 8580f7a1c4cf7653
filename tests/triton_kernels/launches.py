"""Calls on an offline device for test_launch.py, which runs this file in a process of its own; prints JSON.

python tests/triton_kernels/launches.py signatures compilations keys arguments hooks threads private
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import offline
import torch
import triton

import anl_kernels as ak
from anl_kernels import triton_kernels
from anl_kernels.backends import triton as backend
from anl_kernels.functional import checked_call
from anl_kernels.triton_kernels import launch, reduce


def signatures() -> dict:
    """What launch.launch relies on, kernel by kernel."""
    from triton.runtime.jit import JITFunction

    found = {}
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        for name, kernel in vars(importlib.import_module(f"anl_kernels.triton_kernels.{module.name}")).items():
            if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                passed = [p for p in kernel.params if not p.is_constexpr]
                found[name] = {
                    "constexprs_last": kernel.params[: len(passed)] == passed,
                    "specialized": [
                        p.name
                        for p in passed
                        if not (p.do_not_specialize or p.name.endswith("_ptr") or p.name == "numbers")
                    ],
                }
    return found


def loss(
    expression, shape=(256, 1000), dtype=torch.float32, target_dtype=torch.int64, skip=0, gradient=True, **options
):
    """Launches one loss with its gradient; skip: elements between a multiple of 16 bytes and the rows."""
    options = {"reduction": "mean", "min_prob": 1e-7, "weight": None, "ignore_index": -100} | options
    weight = options["weight"]
    call = checked_call(
        expression, options["ignore_index"], options["reduction"], 0.0, options["min_prob"], False, None, "triton"
    )
    elements = torch.Size(shape).numel()
    logits = torch.empty(elements + 64, dtype=dtype)[skip : skip + elements].view(shape)
    grad = torch.empty(elements + 64, dtype=dtype)[skip : skip + elements].view(shape) if gradient else None
    target = torch.empty(shape[:1] + shape[2:], dtype=target_dtype)
    backend.row_loss(call, logits, target, weight, grad, None)


def compilations() -> dict:
    """How many kernels each change compiles anew, after ANL-CE with 1000 classes."""
    anl = lambda a, b: a * ak.NCE() + b * ak.NNCE()
    focal = lambda gamma: ak.NFL(gamma=gamma) + ak.NNFL(gamma=gamma)
    weight = torch.ones(1000)
    calls = {
        "first": lambda: loss(anl(1, 1)),
        "again": lambda: loss(anl(1, 1)),
        "alpha and beta": lambda: loss(anl(5, 0.25)),
        "min_prob": lambda: loss(anl(1, 1), min_prob=1e-5),
        "rows": lambda: [loss(anl(1, 1), (n, 1000)) for n in (255, 256, 300, 1024, 16000)],
        "classes": lambda: [loss(anl(1, 1), (256, k)) for k in (600, 604, 992, 1016, 1024)],
        "ignore_index": lambda: [loss(anl(1, 1), ignore_index=i) for i in (0, 1, 16, -1)],
        "focal": lambda: loss(focal(0.5)),
        "gamma": lambda: [loss(focal(gamma)) for gamma in (0.0, 1.0, 2.0, 0.7)],
        "weights": lambda: loss(anl(1, 1), weight=weight),
        "other weights": lambda: loss(anl(1, 1), weight=weight * 2),
        "odd classes": lambda: loss(anl(1, 1), (256, 999)),
        "other odd classes": lambda: [loss(anl(1, 1), (256, k)) for k in (601, 602, 1001, 1023)],
        "another sum": lambda: loss(anl(1, 1) + ak.MAE()),
    }
    counts = {}
    with offline.driver("sm_90"):
        for name, call in calls.items():
            before = {kept.kernel.hash for kept in launch._compiled.values()}
            call()
            counts[name] = len({kept.kernel.hash for kept in launch._compiled.values()} - before)
    return counts


def keys() -> list:
    """The changes of one launch that find what was compiled for the one before."""
    changes = {
        "first": dict(),
        "nothing": dict(),
        "warps": dict(config=launch.LaunchConfig(1, 1024, 8)),
        "stages": dict(config=launch.LaunchConfig(1, 1024, 4, 2)),
        "block": dict(config=launch.LaunchConfig(1, 512, 4)),
        "64 bits": dict(items=2**31),
        "alignment": dict(skip=1),
        "dtype": dict(dtype=torch.float64),
        "compiled in": dict(divide=True),
        "device": dict(index=7),
    }
    found = []
    with offline.driver("sm_90") as driver:
        for name, change in changes.items():
            options = dict(config=launch.LaunchConfig(1, 1024, 4), items=10, skip=0, dtype=torch.float32, divide=False)
            options |= change
            driver.index = options.get("index", driver.index)
            values, before = torch.empty(64, dtype=options["dtype"]), len(launch._compiled)
            args = (values[options["skip"] :], values[:1] if options["divide"] else None, values[:1], 10)
            constexprs = {"DIVIDE": options["divide"]}
            launch.launch(
                reduce.sum_kernel, (1, 1, 1), (*args, options["items"]), constexprs, options["config"], values.device
            )
            if len(launch._compiled) == before:
                found.append(name)
    return found


def hooks() -> list:
    """Whether Triton is told to call somebody's hook, launch by launch: compiled, known, known and without one."""
    chain, hook, found = triton.knobs.runtime.launch_enter_hook, lambda *arguments: None, []
    call = lambda: loss(1.0 * ak.CE(), reduction="none")
    with offline.driver("sm_90") as driver:
        for change in (chain.add, None, chain.remove):
            if change:
                change(hook)
            call()
            found.append(bool(driver.launches[-1][-3]))  # the chain empties later
    return found


def threads() -> dict:
    """Calls from several threads at once, and one by one: what they launch."""
    calls = [(ak.NCE() + ak.MAE(), (rows, classes)) for classes in (500, 601, 40_000) for rows in (2, 3, 300)]
    once = lambda call: loss(call[0], call[1])
    results = []
    for workers in (1, 4):
        with offline.driver("sm_90") as driver, ThreadPoolExecutor(workers) as pool:
            list(pool.map(once, calls * workers))
        results.append(Counter(str((name, grid, packed)) for name, grid, _, packed, *_ in driver.launches))
    one, four = results
    return {"launches": one.total(), "wrong": [made for made in one | four if four[made] != 4 * one[made]]}


def twice_each(calls) -> tuple[list, int]:
    """What would have been launched by launches made twice each; how many of them Triton's JITFunction.run made."""
    once, by_triton = launch._launch_here, launch._launch_by_triton

    def twice(*rest):
        once(*rest)
        once(*rest)

    with (
        mock.patch.object(launch, "_launch_here", twice),
        mock.patch.object(launch, "_launch_by_triton", side_effect=by_triton) as made,
        offline.driver("sm_90") as driver,
    ):
        for options in calls:
            loss(ak.NCE() + ak.RCE(), **options)
    pointers = lambda values: tuple(v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values)
    return [(*found[:-1], pointers(found[-1])) for found in driver.launches], made.call_count


def compared(launches) -> dict:
    """Second launches that pass on something else than the first."""
    pairs = list(zip(launches[::2], launches[1::2]))
    return {"compared": len(pairs), "wrong": [f"{first} {second}" for first, second in pairs if first != second]}


def arguments() -> dict:
    """Launches that pass on something else when they find a compiled kernel than Triton does when there is none."""
    calls = [
        dict(),
        dict(skip=1),
        dict(skip=2, dtype=torch.bfloat16),
        dict(target_dtype=torch.uint8),
        dict(gradient=False),
    ]
    calls += [dict(shape=(8, 19, 16, 16)), dict(shape=(64, 10)), dict(reduction="none"), dict(shape=(300, 70000))]
    calls += [dict(), dict(skip=4), dict(dtype=torch.float64), dict(weight=torch.ones(1000))]
    return compared(twice_each(calls)[0])


def private() -> dict:
    """The same of two calls, for the installed Triton, and as if it were one that nobody knows."""
    calls = [dict(), dict(shape=(3, 40_000), reduction="none", weight=torch.ones(40_000))]
    found = {}
    for name, version in (("known", triton.__version__), ("unknown", "4.0.0")):
        with mock.patch.object(triton, "__version__", version):
            launches, by_triton = twice_each(calls)
        found[name] = {**compared(launches), "by Triton": by_triton}
    return {"version": triton.__version__, **found}


if __name__ == "__main__":
    print(json.dumps({name: globals()[name]() for name in sys.argv[1:]}))
