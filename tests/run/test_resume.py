"""What a resumed run may be told, who may resume it, and that nothing is done twice."""

import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from runs import GYM, SAMPLES, run, state_of

from fastdreamer import train
from fastdreamer.config import FIXED_ON_RESUME, FREE_ON_RESUME, Config, defaults, load_config, options, parse_command
from fastdreamer.run.checkpoint import Checkpoints
from fastdreamer.run.parts import build
from fastdreamer.run.records import new_run, read_metrics
from fastdreamer.run.trainer import Trainer


@pytest.fixture(autouse=True)
def _beside_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SAMPLES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(SAMPLES)
        return run([*GYM, "--frames", "60", "--eval-every", "20"], tmp_path_factory.mktemp("finished"))


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    return shutil.copytree(finished, tmp_path / "run")


def types(kind: type[Any] = Config) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in fields(kind):
        found |= types(each.type) if isinstance(each.type, type) and is_dataclass(each.type) else {each.name: each.type}
    return found


def arguments(name: str, value: Any) -> list[str]:
    """The option with another value than the one given."""
    kind, flag = types()[name], f"--{name.replace('_', '-')}"
    if kind is bool:
        return [f"--no-{flag[2:]}" if value else flag]
    if get_origin(kind) is Literal:
        return [flag, next(choice for choice in get_args(kind) if choice != value)]
    if kind in (int, float):
        return [flag, str(value + 1 if kind is int else 1.0 if value == 0 else value / 2)]
    return [flag, f"other/{name}"]


def test_every_option_has_its_place_in_the_table() -> None:
    assert sorted([*FIXED_ON_RESUME, *FREE_ON_RESUME]) == sorted(types())
    assert all([*FIXED_ON_RESUME.values(), *FREE_ON_RESUME.values()])


def test_the_table_of_options_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = defaults("dmc")
    config = replace(config, env=replace(config.env, background="videos", eval_background="others"))
    started = new_run(tmp_path, config.task, asdict(config))
    before = (started / "config.yaml").read_text()
    for name, value in options(config).items():
        given = arguments(name, value)
        if name in FREE_ON_RESUME:
            command, _ = parse_command(["--resume", str(started), *given], cuda=False)
            assert options(command.config)[name] != value
        else:
            assert train.main(["--resume", str(started), *given]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"error: {given[0]} cannot change in a resumed run"), error
            assert error.count("\n") == 1
    for other in ("noise", "None"):
        assert train.main(["--resume", str(started), "--background", other, "--eval-background", other]) == 2
        assert "error: --background cannot become" in capsys.readouterr().err
    assert (started / "config.yaml").read_text() == before


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted({*FREE_ON_RESUME} - {"backend", "render", "background", "eval_background"}))
def test_a_run_goes_on_with_another_value(name: str, folder: Path) -> None:
    given = arguments(name, options(load_config(folder))[name])
    if name in ("device", "kernels"):
        pytest.skip("the other choices need a GPU")
    more = [] if name == "frames" else ["--frames", "80"]
    assert train.main(["--resume", str(folder), *given, *more]) == 0
    assert state_of(folder)["decisions"] >= (80 if more else 60)


@pytest.mark.parametrize("batch", [["--batch-length", "3"], ["--batch-size", "3"]], ids=["smaller", "larger"])
@pytest.mark.parametrize("old", [False, True], ids=["", "old"])
def test_the_train_ratio_holds_with_another_batch(
    batch: list[str], old: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Checkpoints.load
    if old:
        monkeypatch.setattr(
            Checkpoints, "load", lambda *a, **k: {n: v for n, v in load(*a, **k).items() if n != "replayed"}
        )
    command, _ = parse_command(["--resume", str(folder), *batch, "--train-ratio", "1"], cuda=False)
    optim = command.config.optim
    with build(command.config) as parts:
        trainer = Trainer(parts, resume=False)
        trainer.checkpoints = Checkpoints(folder)
        trainer._restore()
        begun, updates, replayed = trainer.decisions, trainer.learner.updates, trainer.replayed
        assert trainer.updates_due == updates
        for _ in range(40):
            trainer.iterate()
            due = trainer.decisions - command.config.replay.prefill
            assert due - optim.batch_size * optim.batch_length < trainer.replayed <= due
        made = Fraction(trainer.replayed - replayed, optim.batch_size * optim.batch_length)
        assert trainer.learner.updates - updates == made
        assert made == pytest.approx((trainer.decisions - begun) / (optim.batch_size * optim.batch_length), abs=2)


def test_noise_of_another_kind_of_device_is_drawn_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's generators have 16 bytes of state, a CPU's thousands."""
    load = Checkpoints.load

    def elsewhere(*arguments: Any, **more: Any) -> dict[str, Any]:
        state = load(*arguments, **more)
        return state | {"generators": dict.fromkeys(state["generators"], torch.zeros(16, dtype=torch.uint8))}

    monkeypatch.setattr(Checkpoints, "load", elsewhere)
    assert train.main(["--resume", str(folder), "--frames", "70"]) == 0


def test_a_finished_run_is_left_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated = [row["frames"] for row in read_metrics(folder) if "eval/return_mean" in row]
    assert len(evaluated) == len({*evaluated}) == 3
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}
    for more in ([], ["--eval-episodes", "3"]):
        assert train.main(["--resume", str(folder), *more]) == 0
        assert re.search(rf"the run in {folder} is finished: --frames", capsys.readouterr().out)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"} == before


def test_one_that_was_not_evaluated_is_evaluated(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "eval/return_mean" not in line))
    assert train.main(["--resume", str(folder)]) == 0
    assert len([row for row in read_metrics(folder) if "eval/return_mean" in row]) == 1


HOLD = """
import sys
from pathlib import Path
from fastdreamer.run.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_on_one_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        assert train.main(["--resume", str(folder), "--frames", "70"]) == 2
        assert re.search(rf"{folder} is in use by process {first.pid} on \S+: ", capsys.readouterr().err)
        first.kill()
    assert train.main(["--resume", str(folder), "--frames", "70"]) == 0


def test_a_new_run_holds_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def second(trainer: Trainer) -> None:
        assert trainer.run_folder is not None
        seen.append((trainer.run_folder / "lock").read_text())
        assert train.main(["--resume", str(trainer.run_folder)]) == 2

    monkeypatch.setattr(Trainer, "train", second)
    run([*GYM, "--frames", "60"], tmp_path)
    assert re.match(r"process \d+ on \S+\n", seen[0])
