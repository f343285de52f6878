"""Any combination of --kernels, --precision and --compile trains, and their losses agree."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import NARROW
from runs import DEMO, GYM, PIXELS, run, state_of

from fastdreamer import train
from fastdreamer.config import SIZES, load_config, parse_command
from fastdreamer.run import parts as building
from fastdreamer.run.parts import build
from fastdreamer.run.trainer import Trainer
from fastdreamer.runtime import graphs as runtime

# Each differs in one thing from eager float32 on the reference.
FEW = [("reference", "fp32", True), ("reference", "bf16", False), ("fused", "fp32", False)]
# What `auto` takes is one of the two. The interpreter is slow: of the kernels' four, those that differ most.
COMBINATIONS = [
    *itertools.product(["reference"], ["fp32", "bf16"], [False, True]),
    ("auto", "fp32", False),
    ("fused", "fp32", False),
    ("fused", "bf16", True),
]
CLOSE = {"fp32": 1e-3, "bf16": 0.1}
"""How far the losses of the first update may be from those of the eager float32 reference, or from 1 where smaller."""


@pytest.fixture(autouse=True)
def _beside_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1] / "samples")


def losses(task: Sequence[str], kernels: str, precision: str, compile: bool) -> tuple[dict[str, float], list[float]]:
    """Losses of the first update, and whatever is in the metrics of another."""
    flags = ["--kernels", kernels, "--precision", precision, "--compile" if compile else "--no-compile"]
    command, _ = parse_command([*task, *flags], cuda=False)
    with build(command.config) as parts:
        trainer = Trainer(parts)
        while trainer.learner.updates < 1:
            trainer.iterate()
        trainer.learner.settle()
        first = {name: value for name, value in trainer.learner.means().items() if name.startswith("loss/")}
        while trainer.learner.updates < 2:
            trainer.iterate()
        trainer.learner.settle()
        return first, [*trainer.learner.means().values()]


def check(task: Sequence[str], combinations: Sequence[tuple[str, str, bool]]) -> None:
    torch._dynamo.reset()
    expected, _ = losses(task, "reference", "fp32", False)
    assert len(expected) >= 8
    for kernels, precision, compile in combinations:
        found, later = losses(task, kernels, precision, compile)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            apart = abs(value - expected[name]) / max(1, abs(expected[name]))
            assert apart <= CLOSE[precision], (kernels, precision, compile, name, value, expected[name])
        assert np.isfinite(later).all()


@pytest.mark.thorough
@pytest.mark.interpreter
def test_each_choice_trains_as_the_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SIZES, "tiny", NARROW)
    # The world model's optimiser is then worth compiling; test_compiled.py has the other operations.
    monkeypatch.setattr(runtime, "WORTH", 8_000)
    # A seed with which no rounding turns a draw: of four rows one would change a loss by a tenth.
    least = "--envs 1 --batch-length 2 --horizon 1 --prefill 2 --train-ratio 4 --seed 1"
    check([*PIXELS, *least.split()], FEW)
    assert "compiling adam_step" in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.interpreter
@pytest.mark.parametrize("task", [DEMO, GYM], ids=["pixels, discrete", "vector, continuous"])
def test_every_combination_trains_alike(
    task: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime, "WORTH", 40_000)
    # The interpreter takes long, and knows nothing of where its rows come from.
    check(task, [each for each in COMBINATIONS if task is DEMO or each[0] != "fused"])
    assert "compiling adam_step" in capsys.readouterr().out


def test_a_compiled_run_resumes_without_and_the_reverse(tmp_path: Path) -> None:
    compiled, plain = ["--compile", "--precision", "bf16"], ["--no-compile", "--precision", "fp32"]
    folder = run([*GYM, *compiled, "--frames", "32"], tmp_path)
    for frames, flags in (("48", plain), ("64", compiled)):
        assert train.main(["--resume", str(folder), "--frames", frames, *flags]) == 0
    assert load_config(folder).run.compile
    assert state_of(folder)["learner"]["updates"] == (64 - 16) // 8


def test_auto_takes_bf16_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")

    def precision(*flags: str) -> str:
        command, _ = parse_command(["--preset", "demo", *flags], cuda=False)
        return building.make_runtime(command.config, cpu).precision

    monkeypatch.setattr(building, "prepare_process", lambda *_, **__: None)
    monkeypatch.setattr(building, "fast_bf16", lambda _: True)
    assert precision("--size", "S", "--compile") == "bf16"
    assert precision("--size", "S") == "fp32"
    assert precision("--compile") == "fp32"
    assert precision("--compile", "--precision", "bf16") == "bf16"
    monkeypatch.setattr(building, "fast_bf16", lambda _: False)
    assert precision("--size", "S", "--compile") == "fp32"


def test_without_a_compiler_it_says_so_and_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._inductor import cpp_builder, exc

    def nothing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing)
    monkeypatch.setattr(runtime, "WORTH", 0)
    _, later = losses(GYM, "reference", "fp32", True)
    assert np.isfinite(later).all()
    assert "nothing is compiled: there is no C++ compiler" in capsys.readouterr().out
