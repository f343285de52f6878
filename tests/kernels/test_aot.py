"""Ahead-of-time compilation for GPUs that are not here."""

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastdreamer_kernels import aot, cases
from fastdreamer_kernels.machine import TARGETS
from fastdreamer_kernels.ops import FOLDERS

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


ONE = "S"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=3600, env=ENVIRONMENT)


@pytest.mark.thorough
def test_one_preset_compiles_on_three_architectures() -> None:
    check(run("-m", "fastdreamer_kernels.aot", "--size", ONE))


@pytest.mark.thorough
@pytest.mark.parametrize("size", [size for size in cases.SIZES if size != ONE])
def test_every_other_preset_compiles_on_three_architectures(size: str) -> None:
    check(run("-m", "fastdreamer_kernels.aot", "--size", size))


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    rows = re.findall(r"^(sm_\d+) +(\w+)\.(\w+) .* (\d+) +(\d+) +(\d+)  (\S+)$", done.stdout, re.MULTILINE)
    assert {arch for arch, *_ in rows} == set(TARGETS)
    assert {FOLDERS.get(operation, operation) for operation in cases.MAKERS} <= {operation for _, operation, *_ in rows}
    assert all(8 <= int(registers) <= 255 for _, _, _, registers, *_ in rows)
    assert all(int(spills) <= aot.ONCE for *_, spills, _, _ in rows)
    assert f"{len(rows)} compiled, 0 with" in done.stdout


TWO = r"""
import re
from fastdreamer_kernels import aot, cases

# A wide row on too few threads.
wide = cases.Case("layer_norm_act", "", {"rows": 9, "columns": 2048})
variant = next(v for v in aot.variants([wide], "sm_90") if v.kernel == "backward_kernel")
print(aot.compile_variant(variant._replace(num_warps=1), "sm_90").fault)

case = next(case for case in cases.preset("tiny") if case.operation == "rssm_observe")
variant = next(v for v in aot.variants([case], "sm_90") if dict(v.constants).get("PHASE") == 0)
*steps, rest = aot.machine_code(variant, "sm_90").split("CCTL.IVALL")
for phase in steps:
    assert re.search(r"\bLDG\.E\S*STRONG", phase) and re.search(r"\bSTG\.E.*MEMBAR", phase, re.DOTALL), phase
assert not re.search(r"\b(?:LDG|STG)\.E", rest), rest
print(len(steps), "meetings in", variant.kernel, aot.compile_variant(variant, "sm_90").fault)
"""


@functools.cache
def two_kernels() -> subprocess.CompletedProcess[str]:
    return run("-c", TWO)


def test_a_kernel_that_spills_is_a_fault() -> None:
    assert re.match(r"spills \d+ bytes\n", two_kernels().stdout), two_kernels().stderr


def test_a_sequence_s_kernel_reads_and_writes_between_its_meetings() -> None:
    assert two_kernels().stdout.endswith("\n5 meetings in forward_kernel None\n"), two_kernels().stderr


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


@pytest.mark.thorough
@pytest.mark.parametrize("arch", TARGETS)
def test_no_load_or_store_moves_across_a_meeting(arch: str) -> None:
    """Between two meetings the machine code loads and stores exactly what the phase does that is compiled alone."""
    done = run("-c", MOVES, arch)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = set(re.findall(r"^(\w+)_kernel (\w+) (\d)$", done.stdout, re.MULTILINE))
    # An A100 has too little shared memory for weights that stay.
    forms = ("False",) if arch == "sm_80" else ("True", "False")
    assert kernels == {(way, form, n) for way, n in (("forward", "5"), ("backward", "4")) for form in forms}


def usage(spills: int, shared: int) -> aot.Usage:
    return aot.Usage(aot.Variant("a.b.fused", "kernel", (), (), (), 4, ()), "sm_80", 32, spills, shared, "none")


def test_faults_are_spills_and_too_much_shared_memory() -> None:
    assert usage(0, 163 * 1024).fault is None
    assert "shared memory" in (usage(0, 163 * 1024 + 1).fault or "")
    assert "spills 8 bytes" in (usage(8, 0).fault or "")
    assert aot.describe(usage(8, 0)).endswith("spills 8 bytes")


def test_the_interpreter_leaves_nothing_to_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 2
    assert capsys.readouterr() == ("", "error: TRITON_INTERPRET=1 leaves nothing to compile: unset it.\n")


EARLY = r"""
import re
from fastdreamer_kernels import aot, cases

for variant in aot.variants(cases.preset("tiny"), "sm_90"):
    options = dict(variant.options)
    assert options.get("launch_pdl", False) != (options.get("num_stages") == 1), variant
    text = aot._compiled(variant, "sm_90").asm["ptx"]
    wait, first = text.index("griddepcontrol.wait"), re.search(r"\b(?:ld|st|atom|red)\.(?:\w+\.)*global", text)
    assert wait < first.start(), variant
    print(variant.kernel)
"""


@pytest.mark.thorough
def test_a_kernel_that_is_started_early_touches_no_memory_before_it_has_waited() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EARLY], capture_output=True, text=True, timeout=3600,
        env=ENVIRONMENT | {"FASTDREAMER_PDL": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(set(done.stdout.split())) > 15


def test_every_kernel_begins_where_it_may_have_to_wait() -> None:
    kernels = Path(aot.__file__).parent.glob("*/*.py")
    found = [
        (node.name, ast.unparse(node.body[1 if ast.get_docstring(node) else 0]))
        for path in kernels
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    ]
    assert len(found) > 20
    assert [name for name, first in found if first != "after_others()"] == []
