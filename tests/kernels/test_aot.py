"""Ahead-of-time compilation for GPUs that are not here."""

import os
import re
import subprocess
import sys

import pytest
from fastdreamer_kernels import aot, cases
from fastdreamer_kernels.machine import TARGETS
from fastdreamer_kernels.ops import FOLDERS

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=1200, env=ENVIRONMENT | environment
    )


@pytest.mark.timeout(1200)
def test_every_kernel_compiles_for_every_preset_without_spills() -> None:
    # The posterior sequence at one size that is resident and one that is not: the others take minutes.
    others = [operation for operation in cases.MAKERS if operation != "rssm_observe"]
    check(run("-m", "fastdreamer_kernels.aot", "--operation", *others), set(others))
    check(run("-m", "fastdreamer_kernels.aot", "--operation", "rssm_observe", "--size", "S"), {"rssm_observe"})


@pytest.mark.slow
def test_the_posterior_sequence_compiles_at_every_preset() -> None:
    check(run("-m", "fastdreamer_kernels.aot", "--operation", "rssm_observe"), {"rssm_observe"})


MOVES = r"""
import re, sys
from fastdreamer_kernels import aot, cases

COUNTED = {
    "written by others": r"\bLDG\.E\.(?:64|128)\.STRONG\.GPU",
    "other loads": r"\bLDG\.E(?!\S*STRONG)",
    "stores": r"\bSTG\.E",
}

def count(code):
    return {name: len(re.findall(pattern, code)) for name, pattern in COUNTED.items()}

def phase(variant, number):
    constants = tuple((name, number if name == "PHASE" else value) for name, value in variant.constants)
    return variant._replace(constants=constants)

arch = sys.argv[1]
case = next(case for case in cases.preset("S") if case.operation == "rssm_observe")
for variant in aot.variants([case], arch):
    constants = dict(variant.constants)
    if constants.get("PHASE") != 0:
        continue
    # The invalidation of the processor's own cache ends each wait.
    code = aot.machine_code(variant, arch)
    *steps, rest = [count(part) for part in code.split("CCTL.IVALL")]
    alone = [count(aot.machine_code(phase(variant, i), arch)) for i in range(1, len(steps) + 1)]
    print(variant.kernel, constants["RESIDENT"], len(steps))
    assert not any(rest.values()), rest
    assert code.count("MEMBAR") >= len(steps)
    for i, (together, apart) in enumerate(zip(steps, alone)):
        assert all(apart[name] for name in ("stores", "other loads", "written by others")), apart
        for name in ("stores", "written by others") if constants["RESIDENT"] else COUNTED:
            assert together[name] == apart[name], (variant.kernel, i + 1, together, apart)
    # Weights that stay are loaded ahead of all steps, and nothing twice.
    assert sum(part["other loads"] for part in steps) == sum(part["other loads"] for part in alone)
"""


def check_moves(arch: str) -> set[tuple[str, ...]]:
    done = run("-c", MOVES, arch)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^(\w+)_kernel (\w+) (\d)$", done.stdout, re.MULTILINE))


def test_no_load_or_store_moves_across_a_meeting() -> None:
    """Between two meetings the machine code loads and stores exactly what the phase does that is compiled alone."""
    kernels = check_moves("sm_90")
    assert kernels == {(way, form, n) for way, n in (("forward", "5"), ("backward", "4")) for form in ("True", "False")}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_no_load_or_store_moves_across_a_meeting_elsewhere(arch: str) -> None:
    assert {way for way, *_ in check_moves(arch)} == {"forward", "backward"}


def check(done: subprocess.CompletedProcess[str], operations: set[str]) -> None:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    rows = re.findall(r"^(sm_\d+) +(\w+)\.(\w+) .* (\d+) +(\d+) +(\d+)  (\S+)$", done.stdout, re.MULTILINE)
    assert {arch for arch, *_ in rows} == set(TARGETS)
    own = {name for operation in operations for name in [FOLDERS.get(operation, operation)]}
    assert own <= {operation for _, operation, *_ in rows}
    assert all(8 <= int(registers) <= 255 for _, _, _, registers, *_ in rows)
    assert all(int(spills) <= aot.ONCE for *_, spills, _, _ in rows)
    assert f"{len(rows)} compiled, 0 with" in done.stdout


def test_a_kernel_that_spills_is_a_fault() -> None:
    """The widest row that fits, on too few threads."""
    done = run(
        "-c",
        "import torch\n"
        "from fastdreamer_kernels import aot\n"
        "from fastdreamer_kernels.cases import Case\n"
        "variant, *_ = [v for v in aot.variants([Case('layer_norm_act', '', {'rows': 9, 'columns': 16384})], 'sm_90')\n"
        "               if v.kernel == 'backward_kernel']\n"
        "usage = aot.compile_variant(variant._replace(num_warps=4), 'sm_90')\n"
        "print(usage.fault)",
    )
    assert re.search(r"spills \d+ bytes", done.stdout), done.stderr


def usage(spills: int, shared: int) -> aot.Usage:
    return aot.Usage(aot.Variant("a.b.fused", "kernel", (), (), (), 4, ()), "sm_80", 32, spills, shared, "none")


def test_faults_are_spills_and_too_much_shared_memory() -> None:
    assert usage(0, 163 * 1024).fault is None
    assert "shared memory" in (usage(0, 163 * 1024 + 1).fault or "")
    assert "spills 8 bytes" in (usage(8, 0).fault or "")
    assert aot.describe(usage(8, 0)).endswith("spills 8 bytes")


def test_the_interpreter_leaves_nothing_to_compile() -> None:
    done = run("-m", "fastdreamer_kernels.aot", TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "TRITON_INTERPRET=1 leaves nothing to compile: unset it" in done.stderr
