"""Whole runs, made tiny: what they leave behind, that they repeat and resume bit for bit, and how they end."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fastdreamer_kernels import ops
from runs import DEMO, GYM, PIXELS, SAMPLES, SMALL, TASKS, differences, episodes, run, state_of

from fastdreamer import envs, evaluate, train
from fastdreamer.algorithm.agent import Agent, Optimizers, UpdateNoise
from fastdreamer.algorithm.world_model import Batch
from fastdreamer.config import Config, parse_command
from fastdreamer.envs.base import Spaces
from fastdreamer.run import parts as building
from fastdreamer.run.checkpoint import Checkpoints
from fastdreamer.run.evaluation import evaluate as evaluate_agent
from fastdreamer.run.parts import build, build_agent
from fastdreamer.run.records import read_metrics
from fastdreamer.run.trainer import Trainer
from fastdreamer.runtime.graphs import Runtime
from fastdreamer.runtime.learner import NonFinite

PATIENCE = 600
"""Seconds after which what a process should do counts as not coming: as many as never pass on a busy machine."""


@pytest.fixture(autouse=True)
def _beside_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SAMPLES)


@pytest.fixture(scope="module")
def gym_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(SAMPLES)
        return run([*GYM, "--frames", "40", "--eval-every", "30"], tmp_path_factory.mktemp("gym"))


@pytest.fixture
def own_run(gym_run: Path, tmp_path: Path) -> Path:
    """A copy of it, to go on with."""
    return shutil.copytree(gym_run, tmp_path / gym_run.name)


RESUMED = TASKS | {"textures": [*DEMO, "--background", "noise"]}


@pytest.mark.parametrize(
    "task", ["vector", *(pytest.param(task, marks=pytest.mark.thorough) for task in RESUMED if task != "vector")]
)
def test_resumed_run_equals_one_in_one_go(task: str, tmp_path: Path) -> None:
    """In the midst of episodes, and with a ring that has gone round."""
    arguments = [*RESUMED[task], "--replay-capacity", "30"]
    whole = run([*arguments, "--frames", "80"], tmp_path)
    half = run([*arguments, "--frames", "48"], tmp_path)
    before = state_of(half)
    assert not before["pending"]["is_first"].any()
    assert train.main(["--resume", str(half), "--frames", "80"]) == 0
    assert not differences(state_of(whole), state_of(half))
    assert episodes(whole) == episodes(half)
    record = yaml.safe_load((half / "config.yaml").read_text())
    assert record["config"]["run"]["frames"] == 80
    assert len(record["resumed"]) == 1
    assert len(episodes(whole)) > 5
    # Not one state for every time, nor for every run.
    assert any("agent" in name for name in differences(state_of(whole), before))
    configs = [parse_command([*arguments, "--seed", seed], cuda=False)[0].config for seed in "01"]
    spaces = Spaces(**before["spaces"])
    one, other = (build_agent(config, spaces, ops.load("reference"), torch.device("cpu")) for config in configs)
    assert differences(one.state_dict(), other.state_dict())


def test_what_a_run_leaves_behind(gym_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run([*DEMO, "--frames", "60"], tmp_path)
    out = capsys.readouterr().out
    assert out.startswith("preset demo (envpool/Catch-v0, size tiny) as --preset says")
    assert "replay: 2,000 steps, 0.0 GB on cpu" in out
    assert re.fullmatch(r"envpool_Catch-v0-\d{8}-\d{6}", folder.name)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["config"]["env"]["envs"] == 3
    assert {"python", "torch", "envpool"} <= config["versions"].keys()
    for name in ("metrics.jsonl", "learning_curve.png", "dream.gif"):
        assert (folder / name).stat().st_size > 0
    assert list(folder.glob("events.out.tfevents*"))
    rows = list(read_metrics(folder))
    losses = [row for row in rows if "loss/model" in row]
    expected = {"loss/reward", "loss/value", "loss/action", "loss/dyn", "grad/model", "behavior/entropy"}
    assert expected <= losses[0].keys()
    assert all(np.isfinite(row["loss/model"]) for row in losses)
    (evaluation,) = [row for row in rows if "eval/return_mean" in row]
    assert len([row for row in read_metrics(gym_run) if "eval/return_mean" in row]) == 2

    assert evaluate.main([str(folder), "--episodes", "4", "--json", "--video"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"return_mean", "return_std", "returns"}
    assert len(result["returns"]) == 4
    assert set(result["returns"]) <= {-1.0, 1.0}
    assert result["return_mean"] == pytest.approx(np.mean(result["returns"]))
    assert result["return_std"] == pytest.approx(np.std(result["returns"]))
    assert (folder / "evaluation.gif").stat().st_size > 0
    # The same weights, seeds and noise as at the run's end.
    assert evaluation["eval/return_mean"] == result["return_mean"]
    assert evaluate.main([str(gym_run), "--episodes", "1"]) == 0
    assert "over 1 episodes" in capsys.readouterr().out


def test_an_episode_that_a_crash_cut_short_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", str(tmp_path / "fault"))
    command, _ = parse_command([*GYM, "--task", "gym/env_samples:Faulty-v0"], cuda=False)
    spaces = Spaces(image=False, vector=4, action=2, discrete=False)
    agent = build_agent(command.config, spaces, ops.load("reference"), torch.device("cpu"))
    result = evaluate_agent(agent, command.config, Runtime(torch.device("cpu")), episodes=3, steps=100)
    assert (tmp_path / "fault").exists()
    assert result is not None
    assert len(result.returns) == 3
    # The first environment has two of them, and both have been recorded from their first row to their last.
    for total, rows in zip((result.returns[0], result.returns[2]), result.recorded, strict=True):
        assert rows["is_first"].tolist() == [True, *[False] * 7]
        assert rows["is_last"].tolist() == [*[False] * 7, True]
        assert total == pytest.approx(rows["reward"].sum())


def test_train_ratio_is_exact() -> None:
    command, _ = parse_command([*GYM, "--envs", "3", "--train-ratio", "0.7", "--frames", "500"], cuda=False)
    with build(command.config) as parts:
        trainer = Trainer(parts)
        for _ in range(40):
            trainer.iterate()
            due = max(0, trainer.decisions - 16) * 0.7 / (2 * 4)
            assert trainer.learner.updates == int(due + 1e-9)
        # Each episode is 7 decisions and a first row; the row in flight is not counted yet.
        assert trainer.decisions == 3 * (40 - 5)
        assert len(trainer.replay) == 3 * 40


def test_a_replay_in_host_memory_takes_rows_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the device they would come after all updates that were issued."""
    command, _ = parse_command(GYM, cuda=False)
    with build(command.config) as parts:
        trainer, added = Trainer(parts), []
        monkeypatch.setattr(trainer.replay, "add", added.append)
        for _ in range(2):
            trainer.iterate()
            assert added[-1] is trainer.acting.staged


def test_prefill_is_random_and_then_the_policy_acts() -> None:
    command, _ = parse_command([*GYM, "--prefill", "30"], cuda=False)
    with build(command.config) as parts:
        trainer = Trainer(parts)
        nn_actor = trainer.agent.behavior.actor
        torch.nn.init.zeros_(nn_actor.out.weight)
        with torch.no_grad():
            # A policy far outside what the random one can do: mean 1, standard deviation 0.1.
            nn_actor.out.bias.copy_(torch.tensor([20.0, 20.0, -20.0, -20.0]))
        seen = []
        for _ in range(40):
            before = trainer.decisions
            trainer.iterate()
            seen.append((before, trainer.carry.action.numpy().copy()))
        early = np.concatenate([a for d, a in seen if d < 28])
        late = np.concatenate([a for d, a in seen if d > 32])
        assert np.abs(early).max() <= 1
        assert early.std() > 0.4
        assert abs(late.mean() - 1) < 0.1


def test_dry_run_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*DEMO, "--dry-run", "--verbose", "--logdir", str(tmp_path / "none")]) == 0
    out = capsys.readouterr().out
    assert out.index("total: 377,655 trainable parameters") < out.index("of them encoder ") < out.index("memory of")
    assert re.search(r"encoder: [\d,]+ parameters\n    image\.convs\.0\.weight \(4, 3, 4, 4\)", out)
    assert re.search(r"memory of cpu: weights.*, replay 0\.02 GB, .*an update or a checkpoint .*, together", out)
    assert re.search(r"loss/model: \d+\.\d+", out)
    assert not (tmp_path / "none").exists()


PEAK = """
import sys
import torch
from fastdreamer import train
from fastdreamer.runtime.device import peak_memory
assert train.main(sys.argv[1:]) == 0
print("peak", peak_memory(torch.device("cpu")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("compile", ["--compile", "--no-compile"])
def test_dry_run_predicts_peak_memory(compile: str, tmp_path: Path) -> None:
    """With a replay that the run fills: a tenth too little at the most, or a quarter too much."""
    arguments = [*DEMO, compile, "--batch-size", "16", "--batch-length", "16", "--replay-capacity", "20000"]
    arguments += ["--prefill", "19500", "--frames", "20500", "--envs", "32", "--log-every", "100000"]
    command = [sys.executable, "-c", PEAK, *arguments, "--logdir", str(tmp_path)]
    outs = [
        subprocess.run([*command, *more], capture_output=True, text=True, cwd=SAMPLES, check=True).stdout
        for more in (["--dry-run"], [])
    ]
    (predicted,) = re.findall(r"together (\d+\.\d+) GB at the most", outs[0])
    (peak,) = re.findall(r"^peak (\d+)", outs[1], re.MULTILINE)
    assert 0.9 < float(predicted) / (int(peak) / 1e9) < 1.25


@pytest.mark.parametrize("weights", [False, True], ids=["loss", "weights"])
def test_loss_that_is_not_finite_stops_the_run(weights: bool, own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, update = Checkpoints(own_run).latest(), Agent.update

    def poisoned(self: Agent, batch: Batch, noise: UpdateNoise, optimizers: Optimizers) -> dict[str, torch.Tensor]:
        metrics = update(self, batch, noise, optimizers)
        if optimizers.model.steps == 7:
            metrics["loss/reward"] = metrics["loss/reward"] * float("nan")
            if weights:
                with torch.no_grad():
                    for parameter in self.parameters():
                        parameter.fill_(float("nan"))
        return metrics

    monkeypatch.setattr(Agent, "update", poisoned)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--resume", str(own_run), "--frames", "300", "--eval-every", "0"])
    message = str(stopped.value.code)
    assert "loss/reward became nan at update 7" in message
    assert f"resume from {good} with: python -m fastdreamer.train --resume {own_run}" in message
    assert Checkpoints(own_run).latest() == good


@pytest.mark.parametrize("rate", ["--model-lr", "--behavior-lr"])
def test_a_run_that_blows_up_says_where(rate: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main([*GYM, "--frames", "200", rate, "1e30", "--logdir", str(tmp_path)])
    assert re.match(
        r"error: .+ became (nan|-?inf) at update \d+; no checkpoint was written yet", str(stopped.value.code)
    )


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    command, _ = parse_command(GYM, cuda=False)
    with build(command.config) as parts, Trainer(parts, tmp_path) as trainer:
        trainer.iterate()
        good = trainer.save()
        with torch.no_grad():
            next(trainer.agent.behavior.actor.parameters()).fill_(float("inf"))
        with pytest.raises(NonFinite, match="a weight was nan"):
            trainer.save()
        assert Checkpoints(tmp_path).latest() == good


@pytest.mark.parametrize("option", ["--seed 3", "--action-repeat 2", "--train-ratio 2", "--prefill 30", "--frames 9"])
def test_what_a_resumed_run_cannot_change(option: str, gym_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (gym_run / "config.yaml").read_text()
    assert train.main(["--resume", str(gym_run), *option.split()]) == 2
    assert option.split()[0] in capsys.readouterr().err
    assert (gym_run / "config.yaml").read_text() == before


@pytest.mark.parametrize(("old", "new"), [("envs: 2", "envs: abc"), ("size: tiny", "size: foo"), ("seed: 0", "sed: 0")])
def test_a_configuration_that_was_edited_badly(
    old: str, new: str, gym_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (gym_run / "config.yaml").read_text()
    assert old in text
    (tmp_path / "config.yaml").write_text(text.replace(old, new))
    assert train.main(["--resume", str(tmp_path)]) == 2
    assert evaluate.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("config.yaml cannot be read") == 2


def test_nothing_depends_on_timing(gym_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor on the number of processes."""
    rng, recv, update = random.Random(0), envs.Environments.recv, Agent.update

    def slow_recv(self: envs.Environments) -> envs.Step:
        time.sleep(rng.choice([0, 0.02]))
        return recv(self)

    def slow_update(self: Agent, *arguments: Any) -> dict[str, torch.Tensor]:
        time.sleep(rng.choice([0, 0.05]))
        return update(self, *arguments)

    monkeypatch.setattr(envs.Environments, "recv", slow_recv)
    monkeypatch.setattr(Agent, "update", slow_update)
    slow = run([*GYM, "--frames", "40", "--workers", "2"], tmp_path)
    found, expected = state_of(slow), state_of(gym_run)
    # What is kept of the environments' past is kept for each process.
    for state in (found, expected):
        del state["envs"], state["evaluated_at"]
    assert not differences(expected, found)


def test_options_of_a_resumed_run_hold(own_run: Path) -> None:
    command, _ = parse_command(["--resume", str(own_run), "--model-lr", "0.5"], cuda=False)
    with build(command.config) as parts, Trainer(parts, own_run, resume=True) as trainer:
        assert trainer.learner.updates > 0
        assert trainer.parts.optimizers.model.lr == 0.5
        assert trainer.parts.optimizers.actor.lr == command.config.optim.behavior_lr


# Ends of all kinds


@pytest.mark.parametrize(("call", "decisions"), [(20, 32), (150, 60)], ids=["training", "evaluation"])
def test_ctrl_c_saves_and_stops(
    call: int, decisions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the midst of training, and of an evaluation: 60 frames are some 35 rows of both environments."""
    recv, calls = envs.Environments.recv, itertools.count(1)

    def interrupted(self: envs.Environments) -> envs.Step:
        count = next(calls)
        assert count < call + 10, "it goes on"
        if count == call:
            signal.raise_signal(signal.SIGINT)
        return recv(self)

    monkeypatch.setattr(envs.Environments, "recv", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train.main([*GYM, "--frames", "60", "--eval-episodes", "1000000", "--logdir", str(tmp_path)])
    assert stopped.value.code == 128 + signal.SIGINT
    (folder,) = tmp_path.iterdir()
    out = capsys.readouterr().out
    assert f"stopped by SIGINT; go on with: python -m fastdreamer.train --resume {folder}" in out
    assert ("evaluating over" in out) == (call == 150)
    assert "evaluation: return" not in out
    state = state_of(folder)
    assert (state["decisions"], state["learner"]["updates"]) == (decisions, (decisions - 16) // 8)


def start(arguments: Sequence[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "fastdreamer.train", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=SAMPLES, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit, "nothing came"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)])
def test_signals_save_and_stop(number: signal.Signals, tmp_path: Path) -> None:
    """Of a process of its own, from outside."""
    process = start([*GYM, "--frames", "1000000", "--logdir", str(tmp_path)])
    wait_for(lambda: any("loss/model" in path.read_text() for path in tmp_path.glob("*/metrics.jsonl")), process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number, out
    (folder,) = tmp_path.iterdir()
    assert f"stopped by {number.name}; go on with: python -m fastdreamer.train --resume {folder}" in out
    assert "Traceback" not in out
    frames = state_of(folder)["decisions"]
    assert train.main(["--resume", str(folder), "--frames", str(frames + 30)]) == 0
    assert state_of(folder)["decisions"] >= frames + 30


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.thorough)])
def test_killed_at_any_moment_it_resumes(kills: int, tmp_path: Path) -> None:
    """By kill -9: the last checkpoint always loads, and in the end all is as if nothing had happened."""
    rng = random.Random(0)
    process = start([*PIXELS, "--checkpoint-every", "0.02", "--frames", "1000000", "--logdir", str(tmp_path)])
    # Folders are named after the updates so far.
    wait_for(lambda: any(int(path.parent.name[:12]) for path in tmp_path.glob("*/checkpoints/0*/*.json")), process)
    (folder,) = tmp_path.iterdir()
    reached = 0
    for attempt in range(kills):
        if attempt:
            process = start(["--resume", str(folder)])
            begun = Checkpoints(folder).latest()
            # Some die while they start, the others while they train and save.
            if attempt % 4:
                wait_for(lambda begun=begun: Checkpoints(folder).latest() != begun, process)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.communicate()
        decisions = state_of(folder)["decisions"]
        assert decisions >= reached
        reached = decisions
    frames = reached + 20
    assert train.main(["--resume", str(folder), "--checkpoint-every", "300", "--frames", str(frames)]) == 0
    whole = run([*PIXELS, "--frames", str(frames)], tmp_path / "whole")
    assert not differences(state_of(whole), state_of(folder))
    assert episodes(whole) == episodes(folder)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(
            ["--task", "dmc/walker_wlak"], r"--task dmc/walker_wlak .*dmc/walker_walk", marks=pytest.mark.thorough
        ),
        (["--task", "atari/pnog"], r"--task atari/pnog.*atari/pong"),
        pytest.param(["--task", "envpool/Cach-v0"], r"envpool/Cach-v0.*Catch-v0", marks=pytest.mark.thorough),
        (["--task", "catch"], r"--task catch has no family"),
        (["--task", "gym/env_samples:Odd-v0", "--obs", "vector"], r"Tuple"),
        (["--task", "gym/env_samples:Vector-v0"], r"--obs vector"),
        (["--preset", "general"], r"--preset general has no task"),
        (["--backend", "dm_control"], r"--backend dm_control is for dmc/ tasks"),
        (["--render", "fast"], r"--render fast is for dmc/ tasks"),
        (["--background", "videos"], r"--background videos: videos are for dmc/ tasks"),
        (["--preset", "dmc", "--background", "videos"], r"--background needs --eval-background"),
        (["--preset", "dmc", "--background", "none", "--eval-background", "nil"], r"none"),
        (["--batch-length", "1"], r"--batch-length is 1"),
        (["--envs", "0"], r"--envs is 0"),
        (["--gamma", "1.5"], r"--gamma is 1.5"),
        (["--prefill", "3"], r"--prefill is 3.*--batch-length"),
        (["--frames", "800"], r"--frames is 800 and --prefill takes the first 800 \(in decisions: 800\)"),
        (["--preset", "dmc", "--frames", "2048"], r"--frames is 2048 and --prefill .* 2048 \(in decisions: 1024\)"),
        (["--replay-capacity", "100"], r"--replay-capacity is 100.*--prefill"),
        ([*PIXELS, "--replay-capacity", "900000000"], r"--replay-capacity 900000000 needs 11\d+\.\d GB.*lower it"),
        ([*PIXELS, "--actor-gradient", "dynamics"], r"--actor-gradient dynamics needs continuous"),
        ([*GYM, "--kernels", "fused"], r"--kernels fused cannot run: there is no CUDA device here; use --kernels auto"),
        (["--device", "cuda"], r"--device cuda.*--device cpu"),
        (["--resume", "nowhere"], r"There is no run at nowhere"),
        (["--resume", "nowhere", "--task", "atari/pong"], r"--task cannot change in a resumed run"),
        (["--seed", "1000000000"], r"--seed is 1000000000"),
        (["--train-ratio", "inf"], r"--train-ratio is inf"),
        (["--unimix", "0"], r"--unimix is 0"),
        (["--task", "gym/"], r"--task gym/ names no task"),
        (["--task", "gym/foo/bar/v0!", "--obs", "vector"], r"--task gym/foo/bar/v0! cannot be made by Gymnasium"),
    ],
)  # fmt: skip
def test_bad_input(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if {"cuda", "fused"} & {*arguments} and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    # The interpreter, which tests of kernels use, would run them on a CPU.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert train.main([*arguments, "--logdir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert re.search(expected, error), error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("runs/*")), "what is refused leaves nothing behind"


def test_unknown_options_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--no-such-option"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_unwritable_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert train.main([*GYM, "--logdir", str(tmp_path / "file")]) == 2
    assert "--logdir" in capsys.readouterr().err


def test_checkpoints_that_do_not_fit(own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--resume", str(own_run), "--size", "XS"]) == 2
    assert "--size cannot change in a resumed run" in capsys.readouterr().err
    for state in own_run.glob("checkpoints/0*/state.pt"):
        state.write_bytes(state.read_bytes()[:-100])
    assert train.main(["--resume", str(own_run), "--frames", "600"]) == 2
    error = capsys.readouterr().err
    assert "state.pt" in error
    assert "Traceback" not in error
    assert evaluate.main([str(own_run)]) == 2
    assert evaluate.main([str(own_run), "--episodes", "0"]) == 2
    assert evaluate.main([str(tmp_path / "nothing")]) == 2


def test_size_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(building, "available_memory", lambda device: 100_000_000)
    assert train.main([*GYM, "--size", "XL", "--dry-run"]) == 2
    assert re.search(r"--size XL needs \d+\.\d GB", capsys.readouterr().err)


def test_memory_that_runs_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Agent, "update", lambda *_: {"x": torch.empty(2**60)})
    assert train.main([*GYM, "--dry-run"]) == 2
    assert re.search(r"error: memory ran out.*--batch-size", capsys.readouterr().err)


# Every kind of environment trains

KINDS = [
    pytest.param(["--task", "dmc/walker_walk"], marks=pytest.mark.opengl, id="walker_walk pixels"),
    pytest.param(["--task", "atari/pong"], id="pong"),
    pytest.param(["--task", "gym/env_samples:Parts-v0", "--obs", "both"], id="gym both"),
    pytest.param(
        ["--task", "gym/env_samples:Vector-v0", "--obs", "vector", "--objective", "dreamerv3"], id="gym vector, v3"
    ),
]
MORE_KINDS = [
    pytest.param(
        ["--task", "dmc/cartpole_balance", "--render", "fast"], marks=pytest.mark.opengl, id="cartpole fast pixels"
    ),
    pytest.param(["--task", "dmc/cartpole_balance", "--obs", "vector"], id="cartpole vector"),
    pytest.param(["--task", "gym/env_samples:Frames-v0"], id="gym pixels"),
]


def train_a_little(arguments: Sequence[str], folder: Path | None) -> Config:
    command, _ = parse_command([*SMALL, "--envs", "1", "--train-ratio", "4", *arguments], cuda=False)
    with build(command.config) as parts, Trainer(parts, folder) as trainer:
        while trainer.learner.updates < 2:
            trainer.iterate()
        trainer.learner.settle()
        assert all(np.isfinite(value) for value in trainer.learner.means().values())
        if folder is not None:
            trainer.save()
    return command.config


@pytest.mark.parametrize("arguments", KINDS)
def test_every_kind_of_environment_trains(arguments: list[str]) -> None:
    train_a_little(arguments, None)


@pytest.mark.thorough
@pytest.mark.parametrize("arguments", [*KINDS, *MORE_KINDS])
def test_every_kind_of_environment_is_resumed(arguments: list[str], tmp_path: Path) -> None:
    config = train_a_little([*arguments, "--envs", "2"], tmp_path)
    resumed = replace(config, run=replace(config.run, frames=10**6))
    with build(resumed) as parts, Trainer(parts, tmp_path, resume=True) as trainer:
        assert trainer.learner.updates == 2
        trainer.iterate()
