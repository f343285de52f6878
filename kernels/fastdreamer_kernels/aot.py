"""Compiles every kernel for GPUs that need not be there: `python -m fastdreamer_kernels.aot --arch sm_80 sm_90 sm_100`.

Prints what each compiled kernel takes of a processor. Exit code 1 where one spills registers or wants more shared
memory than the architecture has; 2 where this machine cannot compile.
"""

import argparse
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdreamer_kernels import cases
from fastdreamer_kernels.cases import Case
from fastdreamer_kernels.machine import TARGETS

DTYPES = (torch.bfloat16, torch.float32)
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
ONCE = 64
"""Bytes a thread that a kernel for a whole sequence may spill: offsets put away once, before its loop."""
MATRIX = {"wgmma": r"wgmma\.mma_async", "mma.sync": r"mma\.sync", "tcgen05": r"tcgen05\.mma"}


class Variant(NamedTuple):
    """One compilation of a kernel: the type of each argument, the constants, the arguments that 16 divides."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    num_warps: int
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes. `spills`: bytes of local memory a thread; `shared`: bytes a program."""

    variant: Variant
    arch: str
    registers: int
    spills: int
    shared: int
    matrix: str

    @property
    def fault(self) -> str | None:
        if self.spills > (ONCE if ("num_stages", 1) in self.variant.options else 0):
            return f"spills {self.spills} bytes"
        limit = TARGETS[self.arch].shared
        return f"wants {self.shared} of {limit} bytes of shared memory" if self.shared > limit else None


def variants(chosen: Iterable[Case], arch: str) -> list[Variant]:
    """Every compilation that the cases, forward and backward, in fp32 and bf16, would ask for on an architecture."""
    from fastdreamer_kernels import ops
    from fastdreamer_kernels.launch import recording

    found: dict[Variant, None] = {}
    for case in chosen:
        operation = cases.adapted(case.operation, ops.implementation(case.operation, "fused"))
        for dtype in DTYPES:
            inputs = case.smaller().inputs(dtype)
            with recording(TARGETS[arch]) as launches:
                leaves = [inputs[name].requires_grad_() for name in cases.learned(case.operation, inputs)]
                result = operation(**inputs)
                outs = [out for out in ([result] if isinstance(result, Tensor) else result) if out is not None]
                if leaves:
                    torch.autograd.backward([out.sum() for out in outs if out.requires_grad])
            found |= dict.fromkeys(_variant(entry) for entry in launches)
    return list(found)


def _variant(entry: Any) -> Variant:
    """What Triton would compile for a launch: it specialises on integers that are 1 or divisible by 16."""
    signature, constants, aligned = [], list(entry.constants.items()), []
    for i, (name, value) in enumerate(zip(entry.kernel.arg_names, entry.args, strict=False)):
        free = name in (entry.kernel.do_not_specialize or ())
        if isinstance(value, Tensor):
            signature.append((name, POINTERS[value.dtype]))
            aligned.append(i)
        elif value == 1 and not free:
            constants.append((name, value))
            signature.append((name, "constexpr"))
        else:
            signature.append((name, "i32" if abs(value) < 2**31 else "i64"))
            if value % 16 == 0 and not free:
                aligned.append(i)
    signature += [(name, "constexpr") for name in entry.constants]
    return Variant(
        entry.kernel.fn.__module__,
        entry.kernel.__name__,
        tuple(signature),
        tuple(constants),
        tuple(aligned),
        entry.num_warps,
        tuple(entry.options.items()),
    )


def _compiled(variant: Variant, arch: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    source = ASTSource(
        kernel,
        dict(variant.signature),
        constexprs=dict(variant.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in variant.aligned},
    )
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": variant.num_warps} | dict(variant.options)
    return triton.compile(source, target=target, options=options)


def _listing(compiled: Any, option: str) -> str:
    """What NVIDIA's cuobjdump, which Triton brings along, says about a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def machine_code(variant: Variant, arch: str) -> str:
    """The instructions that a variant is compiled to, in the order of their addresses."""
    return _listing(_compiled(variant, arch), "-sass")


def compile_variant(variant: Variant, arch: str) -> Usage:
    """Compiles for `arch` (sm_80, sm_90 or sm_100) and reads off what the result takes."""
    compiled = _compiled(variant, arch)
    listing = _listing(compiled, "-res-usage")
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    matrix = [name for name, pattern in MATRIX.items() if re.search(pattern, compiled.asm["ptx"])]
    return Usage(
        variant,
        arch,
        registers=usage["REG"],
        spills=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        matrix="+".join(matrix) or "none",
    )


def _compile(job: tuple[Variant, str]) -> Usage:
    return compile_variant(*job)


def describe(usage: Usage) -> str:
    """One line of the table."""
    v = usage.variant
    dtypes = sorted({kind.removeprefix("*") for _, kind in v.signature if kind in ("*bf16", "*fp32")})
    shape = " ".join(f"{name}={value}" for name, value in v.constants if name in ("ROWS", "COLUMNS", "BLOCK"))
    name = f"{v.module.split('.')[1]}.{v.kernel}"
    return (
        f"{usage.arch:7}{name:38}{'+'.join(dtypes):10}{shape:26}{v.num_warps:5}{usage.registers:6}"
        f"{usage.spills:8}{usage.shared:9}  {usage.matrix:10}{usage.fault or ''}"
    ).rstrip()


HEADER = f"{'arch':7}{'kernel':38}{'dtypes':10}{'tile':26}{'warps':>5}{'regs':>6}{'spills':>8}{'shared':>9}  matrix"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastdreamer_kernels.aot", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=[*TARGETS], default=[*TARGETS])
    parser.add_argument("--size", nargs="+", choices=[*cases.SIZES], default=[*cases.SIZES], help="presets")
    parser.add_argument("--operation", nargs="+", choices=[*cases.MAKERS], default=[*cases.MAKERS])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: TRITON_INTERPRET=1 leaves nothing to compile: unset it.", file=sys.stderr)
        return 2
    if importlib.util.find_spec("triton") is None:
        print("error: Triton is not installed: pip install triton (Linux).", file=sys.stderr)
        return 2
    chosen = [case for size in options.size for case in cases.preset(size) if case.operation in options.operation]
    jobs = [(variant, arch) for arch in options.arch for variant in variants(chosen, arch)]
    print(HEADER, flush=True)
    faults = 0
    with ProcessPoolExecutor(max(1, options.jobs)) as pool:
        for usage in pool.map(_compile, jobs, chunksize=4):
            print(describe(usage), flush=True)
            faults += usage.fault is not None
    print(f"{len(jobs)} compiled, {faults} with spills or too much shared memory")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
