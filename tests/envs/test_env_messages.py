"""What is said of environments that cannot be made, speak another API, or fail: the cause, and the mend."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from runs import SAMPLES, SMALL
from test_envs import run

from fastdreamer import envs, train
from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs import gym
from fastdreamer.envs.base import BatchEnv, Fault, Step
from fastdreamer.envs.worker import _described

CONFIG = EnvConfig(envs=1, obs="vector", action_repeat=1)


@pytest.fixture(autouse=True)
def _beside_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SAMPLES)


def make(name: str, arguments: str | None = None) -> BatchEnv:
    return gym.build(f"faulty_samples:{name}-v0", EnvConfig(obs="vector", action_repeat=1, env_args=arguments), 0, 1, 0)


def play(batch: BatchEnv) -> Step:
    row = Step.empty(1, batch.spaces)
    batch.reset(row)
    batch.step(np.eye(3, dtype=np.float32)[[0]], row)
    return row


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("OldReset", r"its reset\(\) returns a ndarray and not \(observation, info\)"),
        ("OldSeed", r"its reset\(\) takes no seed \(.*unexpected keyword argument 'seed'\)"),
        ("OldStep", r"its step\(\) returns 4 values"),
        ("LimitedOldStep", r"its step\(\) returns another number of values \(not enough values to unpack.*\)"),
    ],
)
def test_the_old_api_is_named(name, sign):
    told = f"{name}-v0 does not speak Gymnasium's API, maybe Gym's old one: {sign}; have reset"
    with pytest.raises(Fault, match=told):
        play(make(name))


def test_constructor_arguments():
    assert play(make("NeedsArguments", '{"arena": 3}')).reward == 3
    told = (
        r"NeedsArguments-v0 cannot be made without arguments \(.*missing 1 required .*'arena'\): give .* --env-args '{"
    )
    with pytest.raises(BadInput, match=told):
        make("NeedsArguments")
    with pytest.raises(BadInput, match=r"with --env-args {\"arean\": 3} \(.*unexpected keyword argument 'arean'"):
        make("NeedsArguments", '{"arean": 3}')
    # What the constructor itself raises is its own.
    with pytest.raises(TypeError, match="so many walls do not fit"):
        make("NeedsArguments", '{"arena": 3, "walls": 10}')


def test_constructor_arguments_are_recorded_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--task", "gym/faulty_samples:NeedsArguments-v0", "--obs", "vector", "--envs", "1", "--eval-episodes", "1"]
    arguments = [*SMALL, *task, "--frames", "30", "--logdir", str(tmp_path)]
    assert train.main([*arguments, "--env-args", '{"arena": 2}']) == 0
    (folder,) = tmp_path.iterdir()
    assert yaml.safe_load((folder / "config.yaml").read_text())["config"]["env"]["env_args"] == '{"arena": 2}'
    assert train.main(["--resume", str(folder), "--frames", "36"]) == 0
    assert capsys.readouterr().out.count("return 12.00 ± 0.00 over 1 episodes") == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--task", "dmc/walker_walk", "--env-args", "{}"], "--env-args is for gym/ tasks"),
        (["--task", "gym/X", "--env-args", "arena=3"], "--env-args arena=3 is no JSON object"),
        (["--task", "gym/X", "--env-args", "[3]"], r"--env-args \[3\] is no JSON object"),
        (["--task", "gym/faulty_samples:NeedsArguments-v0", "--obs", "vector"], "'arena'.*--env-args"),
        (
            ["--task", "gym/faulty_samples:Unready-v0", "--obs", "vector"],
            r"cannot be made: ValueError: cannot reshape .* \(faulty_samples.py:\d+\): mend the environment\.$",
        ),
    ],
)
def test_refusals(arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*arguments, "--logdir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert re.search(told, error.strip()), error
    assert error.count("\n") == 1
    assert "--timeout" not in error
    assert not list(tmp_path.glob("runs/*"))


def test_the_timeout_is_named_where_time_ran_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdreamer.envs.pool._MAX_DEATHS", 1)
    monkeypatch.setenv("FAULT", str(tmp_path / "fault"))
    config = EnvConfig(envs=1, obs="vector", action_repeat=1, timeout=0.5)
    with envs.make("gym/faulty_samples:Hangs-v0", config, 0) as environments:
        environments.recv()
        action = np.eye(3, dtype=np.float32)[[0]]
        told = (
            "process did not answer within .* seconds, 1 times .*: mend the environment, or give it a longer --timeout"
        )
        with pytest.raises(Fault, match=told):
            run(environments, np.stack([action] * 12))


def test_an_exception_is_told_by_the_users_line() -> None:
    code = compile("\n\nimport numpy\nnumpy.zeros(3).reshape(2)", "/home/me/my_envs.py", "exec")
    with pytest.raises(ValueError, match="reshape") as raised:
        exec(code)
    assert _described(raised.value).endswith("(my_envs.py:4)")
    other = ValueError("two\nlines\n" + "x" * 999).with_traceback(raised.value.__traceback__)
    assert _described(other) == "ValueError: two lines ... (my_envs.py:4)"
