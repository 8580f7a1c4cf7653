"""The device "emulated" of device.cpp, built with g++ into build/ and made known to PyTorch."""

import ctypes
import gc
import sys
import types
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path

import torch
from cuda_on_host import build as host_build

NAME = "emulated"
SOURCE = Path(__file__).with_name("device.cpp")
FLAGS = "-std=c++20 -O1 -fPIC -shared -w".split()


def build():
    """The path of the library, of this source and this PyTorch."""
    state = host_build.digest(FLAGS, torch.__version__, sys.version_info[:2], SOURCE.read_text())
    return host_build.once(host_build.BUILD / f"device-{state}.so", compile_to)


def compile_to(library):
    home = Path(torch.__file__).parent
    includes = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10", "-ltorch"]
    host_build.run([host_build.compiler(), *FLAGS, abi, *includes, str(SOURCE), "-o", str(library), *libraries])


@lru_cache(maxsize=1)
def start():
    """Makes PyTorch know the device; what torch.cuda has that tests and PyTorch itself ask of a device's module."""
    library = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    for name in ("held", "peak"):
        getattr(library, f"anl_emulated_{name}").restype = ctypes.c_int64
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, module_of(library))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return library


def module_of(library):
    module = types.ModuleType(f"torch.{NAME}")

    @contextmanager
    def device(which):
        before = library.anl_emulated_current()
        library.anl_emulated_use(getattr(torch.device(which), "index", which) or 0)
        try:
            yield
        finally:
            library.anl_emulated_use(before)

    @contextmanager
    def waiting_is_allowed():
        before = library.anl_emulated_waiting_is_an_error(False)
        try:
            yield
        finally:
            library.anl_emulated_waiting_is_an_error(bool(before))

    module.device, module.waiting_is_allowed = device, waiting_is_allowed
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.device_count = library.anl_emulated_count
    module.current_device = library.anl_emulated_current
    module.set_device = lambda which: library.anl_emulated_use(torch.device(which).index or 0)
    module.synchronize = module._sleep = lambda *arguments: None
    module.Stream, module.current_stream, module.stream = Stream, lambda: Stream(), lambda stream: stream
    module.set_sync_debug_mode = lambda mode: library.anl_emulated_waiting_is_an_error(mode in ("error", 2))
    module.get_device_name = lambda which=None: "an emulated GPU"
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda which=None: torch.get_rng_state()  # random numbers are the CPU's
    module.set_rng_state = lambda state, which=None: torch.set_rng_state(state)
    return module


class Stream(nullcontext):
    """There is one, and all is done when a call returns: this only lets a test run that uses several."""

    def wait_stream(self, other):
        pass


class Peak:
    """The most that the device's allocator held above what it held at the start."""

    def __enter__(self):
        self.library = start()
        gc.collect()  # what is given back during the call would be taken off
        self.before = self.library.anl_emulated_held()
        self.library.anl_emulated_reset_peak()
        return self

    def __exit__(self, *error):
        self.bytes = self.library.anl_emulated_peak() - self.before


if __name__ == "__main__":
    print(build())
