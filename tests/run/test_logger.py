import builtins
import dataclasses
import io
import itertools
import json
import math
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastdreamer.config import BadInput, defaults, load_config
from fastdreamer.run.logger import Logger
from fastdreamer.run.records import METRICS, new_run, read_metrics


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def test_config_yaml_repeats_the_run(tmp_path):
    config = dataclasses.replace(defaults("demo"), seed=7)
    run = new_run(tmp_path / "deep" / "runs", "gym/my.module:Env-v0", dataclasses.asdict(config))
    assert run.name.startswith("gym_my.module_Env-v0-2")
    assert load_config(run) == config
    record = yaml.safe_load((run / "config.yaml").read_text())
    assert record["versions"]["torch"]
    assert set(record["versions"]) >= {"python", "triton", "numpy", "envpool", "mujoco", "dm_control", "gymnasium"}
    assert record["command"] == shlex.join(sys.orig_argv)
    assert record["git"] is None or len(record["git"]["commit"]) == 40


def test_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    runs = [new_run(tmp_path, "dmc/walker_walk", {}) for _ in range(5)]
    assert len(set(runs)) == 5
    assert all(run.name.startswith("dmc_walker_walk-20260101-000000") for run in runs)


def test_unwritable_logdir_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="--logdir"):
        new_run(tmp_path / "file", "dmc/walker_walk", {})


def test_metrics_are_valid_json_whatever_the_values(tmp_path):
    logger = Logger(tmp_path, total_frames=100, live=False)
    logger.scalars(8, {"loss/a": 1.5, "loss/b": math.nan, "loss/c": -math.inf, "loss/d": np.float32(2.0)}, updates=3)
    logger.episode(9, 0.5, 4)
    logger.close()

    def refuse(constant):
        raise AssertionError(constant)

    first, second = (json.loads(x, parse_constant=refuse) for x in (tmp_path / METRICS).read_text().splitlines())
    assert (first["frames"], first["updates"], first["loss/d"]) == (8, 3, 2.0)
    assert (second["episode/return"], second["episode/length"]) == (0.5, 4)
    row = next(read_metrics(tmp_path))
    assert math.isnan(row["loss/b"])
    assert row["loss/c"] == -math.inf


def test_resume_drops_what_the_checkpoint_does_not_know(tmp_path, capsys):
    logger = Logger(tmp_path, total_frames=100, live=False)
    for frames in range(10, 60, 10):
        logger.episode(frames, float(frames), 10)
        logger.scalars(frames, {"loss/a": 1.0}, updates=frames)
    logger.close()
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"frames": 55, "loss/a": 1.')
    logger = Logger(tmp_path, total_frames=100, live=False, resume_at_frames=30)
    logger.episode(40, 4.0, 10)
    capsys.readouterr()
    logger.progress(40, 40)
    assert "return last 4, mean of 4 16, best 30" in capsys.readouterr().out
    logger.close()
    assert [row["frames"] for row in lines(tmp_path)] == [10, 10, 20, 20, 30, 30, 40]


def test_seconds_go_on_after_a_resume(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    (tmp_path / METRICS).write_text('{"frames": 10, "seconds": 500.0}\n')
    logger = Logger(tmp_path, total_frames=100, live=False, resume_at_frames=10)
    now += 2.5
    logger.scalars(20, {})
    logger.close()
    assert lines(tmp_path)[-1]["seconds"] == 502.5


def test_tensorboard_reads_scalars_and_videos_and_forgets_dropped_steps(tmp_path, monkeypatch):
    clock = itertools.count(time.time_ns())
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    logger = Logger(tmp_path, total_frames=100, live=False)
    for frames in (10, 20, 30):
        logger.scalars(frames, {"loss/a": frames / 10})
    frames = np.random.default_rng(0).integers(0, 255, (6, 16, 24, 3), np.uint8)
    logger.video("dream", 10, frames)
    logger.close()
    logger = Logger(tmp_path, total_frames=100, live=False, resume_at_frames=20)
    logger.scalars(25, {"loss/a": 9.0})
    logger.close()

    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss/a")] == [(10, 1.0), (20, 2.0), (25, 9.0)]
    (image,) = board.Images("dream")
    assert (image.width, image.height) == (24, 16)
    gif = Image.open(io.BytesIO(image.encoded_image_string))
    assert (gif.format, getattr(gif, "n_frames", 1)) == ("GIF", 6)


@pytest.mark.parametrize("target", [METRICS, "events"])
def test_full_disk_is_one_sentence_and_close_stays_calm(tmp_path, monkeypatch, target):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    if target == METRICS:
        (tmp_path / METRICS).symlink_to("/dev/full")
    else:
        monkeypatch.setattr(time, "time_ns", lambda: 1)
        (tmp_path / "events.out.tfevents.1").symlink_to("/dev/full")
    logger = None

    def log():
        nonlocal logger
        logger = Logger(tmp_path, total_frames=100, live=False)
        logger.scalars(1, {"loss/a": 1.0})

    with pytest.raises(BadInput, match=r"cannot be written \(No space left on device\).*--resume"):
        log()
    if logger is not None:
        logger.close()


def test_without_tensorboard_and_rich_metrics_still_come(tmp_path, monkeypatch, capsys):
    real_import = builtins.__import__

    def block(name, *rest):
        if name.split(".")[0] in ("tensorboard", "rich"):
            raise ModuleNotFoundError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", block)
    logger = Logger(tmp_path, total_frames=100, live=True)
    logger.scalars(1, {"loss/a": 1.0})
    logger.video("dream", 1, np.zeros((2, 4, 4, 3), np.uint8))
    logger.progress(1, 1)
    logger.close()
    out = capsys.readouterr().out
    assert out.count("is not installed") == 2
    assert lines(tmp_path)[0]["loss/a"] == 1.0
    assert not list(tmp_path.glob("events*"))


def test_progress_is_sparse_in_plain_output_and_tells_the_time_left(tmp_path, monkeypatch, capsys):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    logger = Logger(tmp_path, total_frames=10_000, live=False)
    for step in range(241):
        logger.progress(step * 16, step * 8)
        now += 0.125
    logger.scalars(3840, {}, updates=1920)
    logger.close()
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 5  # at 0, 10, 20 and 30 seconds, and at the end
    assert "3,840 / 10,000 frames (38%) | 1,920 updates" in out[-1]
    assert "64.0 updates/s, 128 frames/s | 0:00:48 left" in out[-1]
    row = lines(tmp_path)[0]
    assert row["speed/frames"] == 128
    assert row["speed/updates"] == 64


def test_live_display_shows_returns_and_keeps_messages_verbatim(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    logger = Logger(tmp_path, total_frames=1000, live=True)
    logger.episode(100, 3.0, 10)
    logger.episode(200, 1.0, 10)
    logger.scalars(200, {"eval/return_mean": 2.0})
    logger.progress(250, 60)
    logger.message("[bold]not markup[/bold]")
    logger.close()
    out = capsys.readouterr().out
    for text in (
        "250 / 1,000 frames",
        "25%",
        "return last 1, mean of 2 2, best 3",
        "evaluation 2, best 2",
        "60 updates",
    ):
        assert text in out
    assert "[bold]not markup[/bold]" in out
