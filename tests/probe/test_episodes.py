"""The episodes that are probed: what really stood behind each row."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fastdreamer.config import EnvConfig, defaults
from fastdreamer.envs.background import Textures
from fastdreamer.envs.base import Step
from fastdreamer.envs.dm_control import DmControl
from fastdreamer.probe.episodes import CATCH, Stage, catch, patches, random_policy, tossing

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_opengl_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "disable")


def stage(task: str, **env: object) -> Stage:
    config = defaults("demo" if task == CATCH else "general", task, "mudreamer")
    return Stage(replace(config, env=replace(config.env, **env)), seed=0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("obs", ["pixels", "vector"])
def test_catch_tells_ball_and_paddle(obs: str) -> None:
    played = stage(CATCH, obs=obs)
    decide = random_policy(played.spaces, seed=0)
    for _ in range(6):
        rows, truth = played.episode(decide, 100)
        assert rows["is_first"].tolist() == [True] + 9 * [False]
        assert rows["is_last"].tolist() == 9 * [False] + [True]
        assert not rows["action"][0].any()
        assert truth["ball_row"].tolist() == list(range(10))
        assert len(set(truth["ball_column"])) == 1
        # Actions are left, stay and right.
        moved = np.clip(truth["paddle_column"][:-1] + rows["action"][1:].argmax(1) - 1, 0, 4)
        assert moved.tolist() == truth["paddle_column"][1:].tolist()
        assert rows["reward"][-1] == (1 if truth["paddle_column"][-1] == truth["ball_column"][-1] else -1)
    played.close()


def test_catch_reads_where_ball_and_paddle_meet() -> None:
    grids = np.zeros((10, 10, 5), np.float32)
    grids[np.arange(10), np.arange(10), 1] = 1
    grids[:, 9, 3] = 1
    assert catch(grids)["paddle_column"].tolist() == 10 * [3]
    grids[9, 9, 3] = 0
    assert catch(grids)["paddle_column"].tolist() == [*(9 * [3]), 1]


class Carry(NamedTuple):
    action: torch.Tensor


class Still:
    """An agent that always stays; it remembers what it is told that it did."""

    def __init__(self) -> None:
        self.carry, self.did = Carry(torch.zeros(1, 3)), []

    def __call__(self, step: Step) -> None:
        self.did.append(self.carry.action.numpy().copy())
        self.carry = Carry(torch.eye(3)[1:2])

    def actions(self) -> np.ndarray:
        return self.carry.action.numpy()

    def replace(self, carry: Carry) -> None:
        self.carry = carry


def test_a_coin_decides_who_acts_and_the_agent_knows_what_was_done() -> None:
    played, agent, tossed = stage(CATCH), Still(), []
    decide = tossing(agent, random_policy(played.spaces, 0), 0, tossed)  # pyright: ignore[reportArgumentType]
    rows = [played.episode(decide, 100)[0] for _ in range(20)]
    done = np.concatenate([each["action"][1:] for each in rows]).argmax(1)
    coin = np.array(tossed)
    assert len(done) == len(coin) == 180
    assert (done[~coin] == 1).all()
    assert np.bincount(done[coin]).min() > 15
    assert 60 < coin.sum() < 120
    told = np.concatenate([each["action"][:-1] for each in rows])
    inner = np.concatenate([[False] + 8 * [True] for _ in rows])
    assert np.array_equal(np.concatenate(agent.did)[inner], told[inner])
    played.close()


def test_a_background_is_told_and_does_not_hide_the_truth() -> None:
    plain, behind = stage(CATCH), stage(CATCH, eval_background="noise")
    seen = Textures(1000).textures
    for _ in range(2):
        rows, truth = plain.episode(random_policy(plain.spaces, 0), 100)
        shown, told = behind.episode(random_policy(plain.spaces, 0), 100)
        assert all(np.array_equal(told[name], values) for name, values in truth.items())
        white = rows["image"] == 255
        assert (shown["image"][white] == 255).all()
        assert shown["image"][~white].max() <= 200
        assert told["background"].shape == (10, 48)
        # Textures are rolled, so that each keeps its mean colours.
        colour = told["background"].reshape(10, 3, 16).mean(2) * 255
        assert min(np.abs(texture.mean((1, 2)) - colour).max() for texture in seen) < 0.01
        assert not np.allclose(told["background"][0], told["background"][1])
    frame = np.arange(3 * 64 * 64).reshape(3, 64, 64) % 251
    assert patches(frame.astype(np.uint8))[5] == pytest.approx(frame[0, 16:32, 16:32].mean() / 255)


def test_an_episode_is_cut_and_another_begins() -> None:
    played = stage(CATCH)
    for _ in range(2):
        rows, _ = played.episode(random_policy(played.spaces, 0), 3)
        assert rows["is_first"].tolist() == [True, False, False, False]
    rows, _ = played.episode(random_policy(played.spaces, 0), 100)
    assert len(rows["is_first"]) == 10
    played.close()


@pytest.mark.parametrize(("name", "positions"), [("walker_walk", 1 + 2 * 7), ("quadruped_walk", 1 + 9 + 2 * 16)])
def test_the_truth_of_dm_control_is_its_physics(name: str, positions: int) -> None:
    env = DmControl(name, EnvConfig(obs="vector", backend="dm_control"), None)
    env.reset(3)
    rng, touched = np.random.default_rng(0), []
    for _ in range(60):
        env.step(rng.uniform(-1, 1, env.spaces.action).astype(np.float32))
        physics, truth = env._env.physics, env.truth()
        assert {name: values.dtype.name for name, values in truth.items()} == dict.fromkeys(truth, "float32")
        assert truth["qpos"].shape == (positions,)
        np.testing.assert_allclose(truth["qvel"], physics.data.qvel, rtol=1e-6)
        joints = physics.named.data.qpos
        if name == "walker_walk":
            assert truth["qpos"][0] == pytest.approx(joints["rootz"].item(), rel=1e-6)
            hip = joints["right_hip"].item()
            np.testing.assert_allclose(truth["qpos"][3:5], [np.sin(hip), np.cos(hip)], rtol=1e-5)
        else:
            assert truth["qpos"][0] == pytest.approx(physics.named.data.xpos["torso", "z"], rel=1e-6)
            turned = physics.named.data.xmat["torso"]
            np.testing.assert_allclose(truth["qpos"][1:10], turned, atol=1e-5)
        contact = np.zeros(physics.model.nbody)
        for i in range(physics.data.ncon):
            for geom in physics.data.contact[i].geom if physics.data.contact[i].dist <= 0 else ():
                contact[physics.model.geom_bodyid[geom]] = 1
        assert truth["contact"].tolist() == contact.tolist()
        touched.append(contact)
    assert np.any(touched)
    env.close()


@pytest.mark.thorough
@pytest.mark.opengl
def test_pytorch_compiles_and_optimises_after_frames_were_rendered_in_its_process() -> None:
    code = """
from fastdreamer.config import defaults
from fastdreamer.probe.episodes import Stage, random_policy
played = Stage(defaults("dmc", "dmc/cartpole_balance", "mudreamer"), 0)
rows, truth = played.episode(random_policy(played.spaces, 0), 2)
assert rows["image"].shape == (3, 3, 64, 64) and rows["image"].std() > 1 and truth["qpos"].shape == (3, 3)
played.close()
import torch._dynamo
"""
    env = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_an_angle_is_the_same_a_turn_later() -> None:
    env = DmControl("walker_walk", EnvConfig(obs="vector", backend="dm_control"), None)
    env.reset(0)
    before = env.truth()["qpos"]
    env._env.physics.named.data.qpos["right_knee"] += 2 * np.pi
    env._env.physics.named.data.qpos["rootx"] += 5
    np.testing.assert_allclose(env.truth()["qpos"], before, atol=1e-5)
    env.close()
