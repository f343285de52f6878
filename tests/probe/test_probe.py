"""The command: what it says, what it leaves in a run's folder, and what it refuses."""

import json
import re
from pathlib import Path

import env_samples
import pytest
import torch
from PIL import Image
from runs import DEMO, GYM, PIXELS, SAMPLES, run

from fastdreamer.probe import __main__ as probe
from fastdreamer.probe.rollout import Observed


@pytest.fixture(autouse=True)
def _beside_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SAMPLES)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run([*DEMO, "--frames", "30", "--background", "noise"], tmp_path_factory.mktemp("runs"))


def test_runs_are_probed_in_the_same_episodes(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert probe.main([str(demo), str(demo), "--episodes", "10", "--what", "state,rollout,mi"]) == 0
    out, error = capsys.readouterr()
    assert "envpool/Catch-v0: 100 rows of 10 episodes, 5 by random actions; 6 to fit on, 2 to choose by, 2 to t" in out
    assert "take more by --episodes" in error
    for title in (
        "background, R2",
        "ball_column, accuracy",
        "rolled prior: KL",
        "rolled prior: ball_row",
        "I(a_{t-1}; x_t",
    ):
        block = out[out.index(title) :].splitlines()[1:4]
        assert block[1] == block[2]
        assert block[1].startswith(str(demo))
    assert re.search(r"\(.*\)  -  +-\n", out)

    told = json.loads((demo / "probe.json").read_text())
    assert told["features"].keys() == {"s", "h", "z", "x"}
    for scores in told["features"].values():
        assert scores.keys() == {"background", "ball_row", "ball_column", "paddle_column"}
        assert scores["background"].keys() == {"r2", "penalty"}
        assert scores["ball_row"].keys() == {"accuracy", "chance", "penalty"}
    assert told["controls"]["untrained"].keys() == told["features"].keys()
    assert told["controls"]["shuffled"].keys() == {"s"}
    assert told["rollout"].keys() == {"1", "5"}
    assert told["rollout"]["5"].keys() == {
        "kl", "reward_error", "return_error", "ball_row", "ball_column", "paddle_column"
    }  # fmt: skip
    assert told["rollout"]["5"]["ball_row"].keys() == {"rolled", "floor", "persistence"}
    assert told["mi"].keys() == {"nats", "without", "ceiling", "rows", "fit"}
    assert 0 < told["mi"]["rows"] < 18
    assert told["background"] == "noise"
    assert told["episodes"]["count"] == 10
    assert told["seed"] == 0
    with Image.open(demo / "probe.png") as picture:
        assert picture.width > 500

    # Of other episodes, and then more of the same.
    assert probe.main([str(demo), "--episodes", "10", "--what", "rollout"]) == 0
    assert "R2" not in capsys.readouterr().out
    assert "features" not in json.loads((demo / "probe.json").read_text())
    assert not (demo / "probe.png").exists()
    # The coin's episodes alone, beside what was found before.
    assert probe.main([str(demo), "--episodes", "25", "--what", "mi"]) == 0
    out, error = capsys.readouterr()
    assert out.startswith("I(a_{t-1}; x_t")
    assert "actions by the coin are few" in error
    told = json.loads((demo / "probe.json").read_text())
    assert told.keys() >= {"rollout", "mi"}
    assert told["mi"]["low"] <= told["mi"]["nats"] <= told["mi"]["high"]
    drawn = demo / "drawn.png"
    assert probe.main([str(demo), "--episodes", "10", "--what", " state", "--picture", str(drawn)]) == 0
    assert json.loads((demo / "probe.json").read_text()).keys() >= {"features", "controls", "rollout"}
    with Image.open(drawn) as picture:
        assert picture.width > 500


def test_a_state_vector_is_probed_where_nothing_else_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run([*GYM, "--frames", "30"], tmp_path)
    assert probe.main([str(folder), "--episodes", "6", "--eval-steps", "4"]) == 0
    assert "30 rows of 6 episodes" in capsys.readouterr().out
    assert json.loads((folder / "probe.json").read_text())["features"]["s"].keys() == {"vector"}
    assert (folder / "probe.png").exists()


def test_what_cannot_be_probed_is_refused_in_a_sentence(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = run([*PIXELS, "--frames", "30"], tmp_path)
    capsys.readouterr()
    for arguments, sentence in {
        (str(frames), "--episodes", "5"): "--what state needs a truth and --task gym/env_samples:Frames-v0 tells none",
        (str(demo), str(frames)): "compare runs that see the same",
        (str(demo), "--what", "nothing"): "--what nothing is none of state, rollout, mi",
        (str(demo), "--what", ","): "--what names nothing",
        (str(demo), "--episodes", "4"): "--episodes is 4 and must be at least 5",
        (str(demo), "--threads", "-1"): "--threads is -1",
        (str(demo), "--seed", "-1"): "--seed is -1",
        (str(demo), "--background", "videos"): "videos are for dmc/ tasks",
        (str(demo), "--picture", "drawn.jpg"): "--picture drawn.jpg: name a .png file",
        (str(frames), "--picture", "drawn.png"): "--picture needs a run with images and a decoder",
        (): "name run folders",
    }.items():
        assert probe.main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1 or "playing" in error
    assert probe.main([str(frames), "--episodes", "5", "--what", "rollout"]) == 0


def test_broken_weights_and_a_failing_environment_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run([*GYM, "--frames", "30"], tmp_path)
    command = [str(folder), "--episodes", "6", "--eval-steps", "4"]

    def fails(*_: object) -> None:
        raise RuntimeError("out of paint")

    with monkeypatch.context() as patch:
        patch.setattr(env_samples.Vector, "step", fails)
        assert probe.main(command) == 2
    assert "fails in an episode (RuntimeError: out of paint): mend it." in capsys.readouterr().err
    monkeypatch.setattr(Observed, "features", lambda *_: {"s": torch.full((30, 2), torch.nan)})
    assert probe.main(command) == 2
    assert "the latent states of this run are not finite" in capsys.readouterr().err
    assert not (folder / "probe.json").exists()
