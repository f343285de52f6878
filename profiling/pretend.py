"""A process whose tensors are on an H100 that is not there: what compiles for it is traced, and nothing runs.

Tensors have no memory (PyTorch's fake tensors), so only questions about the device need an answer: those that C++ asks
come from `guard.cpp`, which must be there before PyTorch has looked for a GPU, those that Python asks from `install`.
Neither can be taken back, so a process is started for it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdreamer.config import BadInput

GPU = torch.device("cuda:0")
VERSION = "2.13"
"""Of PyTorch: the only one whose questions are known, and one whose launches are counted."""
LONGEST = 3600
"""Seconds that a count may take: fifteen steps of size S take one minute."""
ACTIVE = "FASTDREAMER_PRETENDED"
"""Environment variable of a process that pretends."""


class Properties:
    """An H100's, as far as a compiler asks (CUDA C++ programming guide, table of compute capabilities)."""

    name, gcnArchName, major, minor = "NVIDIA H100 80GB HBM3", "", 9, 0
    multi_processor_count, warp_size = 132, 32
    max_threads_per_block, max_threads_per_multi_processor = 1024, 2048
    regs_per_multiprocessor, shared_memory_per_block_optin, total_memory = 65536, 227 * 2**10, 80 * 2**30


class Driver:
    """Triton's, of that device."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * Properties.major + Properties.minor, Properties.warp_size)


def why_not() -> str | None:
    """Why no process can pretend here, or None."""
    if shutil.which("g++") is None:
        return "there is no C++ compiler: install g++"
    if torch.version.cuda or torch.version.hip or torch.__version__.split(".")[:2] != VERSION.split("."):
        return f"that needs the CPU build of PyTorch {VERSION}, and this is {torch.__version__}"
    return None


def active() -> bool:
    return os.environ.get(ACTIVE) == "1"


def run(script: str, arguments: Sequence[str]) -> str:
    """What a script prints in a process of its own that may `install`. Raises BadInput where there can be none."""
    if (reason := why_not()) is not None:
        raise BadInput(f"no GPU can be pretended: {reason}.")
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            ACTIVE: "1",
            "LD_PRELOAD": str(compiled_guard(Path(folder))),
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TRITON_INTERPRET": "0",
        }
        command = [sys.executable, script, *arguments]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST
            )
        except subprocess.TimeoutExpired:
            raise BadInput(
                f"nothing was counted within {LONGEST} seconds: try fewer steps, or a quieter machine."
            ) from None
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise BadInput("what was to be compiled for an H100 could not be: see above.")
    return done.stdout


def compiled_guard(folder: Path) -> Path:
    source, library, parts = Path(__file__).with_name("guard.cpp"), folder / "guard.so", Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library), f"-I{parts / 'include'}"]
    lib = parts / "lib"
    done = subprocess.run(
        [*command, f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise BadInput("guard.cpp could not be compiled: see above.")
    return library


def install() -> None:
    """Makes PyTorch, its compilers and Triton take this process's GPU for granted, from here on."""
    import torch._dynamo.device_interface as interface
    import triton

    # Processes that are started from here have no use for it.
    os.environ.pop("LD_PRELOAD", None)
    properties = Properties()
    capability = (properties.major, properties.minor)
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "_lazy_init": None,
        "get_device_properties": properties,
        "get_device_capability": capability,
        "get_compute_capability": 10 * capability[0] + capability[1],
        "get_device_name": properties.name,
        "mem_get_info": (properties.total_memory, properties.total_memory),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    cuda = interface.CudaInterface
    for where in (torch.cuda, cuda, cuda.Worker):
        for name in answers.keys() & vars(where).keys():
            setattr(where, name, always(answers[name], of_class=isinstance(where, type)))
    # A fake tensor would rather not touch a GPU that is not there.
    torch._subclasses.fake_tensor.FakeTensorMode.avoid_device_init = property(lambda _: True)  # pyright: ignore
    torch._C._conv_determine_backend_memory_format = memory_format  # pyright: ignore
    triton.runtime.driver.set_active(Driver())  # pyright: ignore


def always(answer: Any, *, of_class: bool) -> Any:
    def function(*args: Any, **options: Any) -> Any:
        del args, options
        return answer

    return staticmethod(function) if of_class else function


def memory_format(images: torch.Tensor, weight: torch.Tensor, backend: Any) -> torch.memory_format:
    """A convolution's on a GPU: channels last where either side is."""
    del backend
    last = [x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in (images, weight)]
    return torch.channels_last if any(last) else torch.contiguous_format
