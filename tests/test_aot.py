"""Ahead-of-time compilation for GPUs that are not here."""

import os
import re
import subprocess
import sys

import pytest
from fastdreamer_kernels import aot, cases

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=1200, env=ENVIRONMENT | environment
    )


@pytest.mark.timeout(1200)
def test_every_kernel_compiles_for_every_preset_without_spills() -> None:
    done = run("-m", "fastdreamer_kernels.aot", "--arch", *aot.ARCHITECTURES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    rows = re.findall(r"^(sm_\d+) +(\w+)\.(\w+) .* (\d+) +0 +(\d+)  (\S+)$", done.stdout, re.MULTILINE)
    assert {arch for arch, *_ in rows} == set(aot.ARCHITECTURES)
    # The posterior sequence has no kernels of its own.
    own = set(cases.MAKERS) - {"twohot_loss", "twohot_mean", "rssm_observe"} | {"twohot"}
    assert {operation for _, operation, *_ in rows} == own
    assert all(8 <= int(registers) <= 255 for _, _, _, registers, _, _ in rows)
    assert f"{len(rows)} compiled, 0 with" in done.stdout


def test_a_kernel_that_spills_is_a_fault() -> None:
    """The widest row that fits, on too few threads."""
    done = run(
        "-c",
        "import torch\n"
        "from fastdreamer_kernels import aot\n"
        "from fastdreamer_kernels.cases import Case\n"
        "variant, *_ = [v for v in aot.variants([Case('layer_norm_act', '', {'rows': 9, 'columns': 16384})])\n"
        "               if v.kernel == 'backward_kernel']\n"
        "usage = aot.compile_variant(variant._replace(num_warps=4), 'sm_90')\n"
        "print(usage.fault)",
    )
    assert re.search(r"spills \d+ bytes", done.stdout), done.stderr


def usage(spills: int, shared: int) -> aot.Usage:
    return aot.Usage(aot.Variant("a.b.fused", "kernel", (), (), (), 4), "sm_80", 32, spills, shared, "none")


def test_faults_are_spills_and_too_much_shared_memory() -> None:
    assert usage(0, 163 * 1024).fault is None
    assert "shared memory" in (usage(0, 163 * 1024 + 1).fault or "")
    assert "spills 8 bytes" in (usage(8, 0).fault or "")
    assert aot.describe(usage(8, 0)).endswith("spills 8 bytes")


def test_the_interpreter_leaves_nothing_to_compile() -> None:
    done = run("-m", "fastdreamer_kernels.aot", TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "TRITON_INTERPRET=1 leaves nothing to compile: unset it" in done.stderr
