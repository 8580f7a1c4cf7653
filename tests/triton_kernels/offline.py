"""Triton's kernels compiled and launched as on a GPU, where there is none: the last step goes nowhere.

In a process whose Triton is not the interpreter. Tensors are on the CPU, or on "meta" (no memory).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# name -> (Triton's target, what a device of that kind tells `launch.target_of`)
TARGETS = {
    "sm_80": (("cuda", 80, 32), ("cuda:80", 32, 108, 40 << 20)),
    "sm_90": (("cuda", 90, 32), ("cuda:90", 32, 132, 50 << 20)),
    "sm_100": (("cuda", 100, 32), ("cuda:100", 32, 148, 126 << 20)),
    "gfx942": (("hip", "gfx942", 64), ("hip:gfx942", 64, 304, 256 << 20)),
}


class Driver:
    """In place of Triton's: `launches` is what would have been launched: name, grid, stream, what the launcher is told
    of the kernel, the hooks it is to call, and the arguments."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        self.target, self.index = GPUTarget(*TARGETS[target][0]), list(TARGETS).index(target)
        self.launches = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 160 << 10},
            load_binary=lambda name, *others: (None, name, 0, 0, 1024),
        )

    def get_current_device(self):
        return self.index

    def get_current_stream(self, index):
        return 7

    def get_current_target(self):
        return self.target

    def launcher_cls(self, src, metadata):
        def run(x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments):
            hooks = [getattr(hook, "calls", hook) or None for hook in (enter_hook, exit_hook)]
            told = launch_metadata if any(hooks) else None  # it is for them
            self.launches.append((function, (x, y, z), stream, packed_metadata, told, *hooks, arguments))

        return run


@contextlib.contextmanager
def driver(target: str):
    """The Driver, while it is Triton's; nothing is compiled yet."""
    import triton

    from anl_kernels.triton_kernels import launch

    assert not launch.INTERPRETED
    before, made = launch._target, Driver(target)
    launch._target = lambda device: launch.Target(*TARGETS[target][1])
    launch._compiled.clear()
    triton.runtime.driver.set_active(made)
    try:
        yield made
    finally:
        launch._target = before


def compiled_by(run, target: str) -> list:
    """(kernel's name, LaunchConfig, CompiledKernel) of what a call launches."""
    from anl_kernels.triton_kernels import launch

    with driver(target):
        run()
        return [
            (key[0].__name__, launch.LaunchConfig(*key[2:6]), kept.kernel) for key, kept in launch._compiled.items()
        ]


def in_a_process(script: str, *arguments: str, triton: Path | None = None):
    """What `python script arguments` prints, from JSON. triton: the folder of another than the installed one."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).parents[2])
    env["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, [triton, root, env.get("PYTHONPATH")])))
    done = subprocess.run([sys.executable, script, *arguments], env=env, capture_output=True, text=True, cwd=root)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} {triton or ''}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)
