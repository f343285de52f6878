"""What an evaluation says and leaves behind, and how a run tells the time that is left."""

import json
import re
import time
from pathlib import Path

import pytest
from PIL import Image
from runs import DEMO, SAMPLES, run

from fastdreamer import evaluate
from fastdreamer.run import evaluation, records
from fastdreamer.run.logger import Logger


@pytest.fixture(autouse=True)
def _beside_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SAMPLES)


def test_an_evaluation_tells_how_far_it_is_and_leaves_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "PLAIN_INTERVAL", 0.0)
    folder = run([*DEMO, "--frames", "30"], tmp_path)
    assert re.search(r"evaluating: 3 of 4 episodes, return -?\d\.\d\d so far", capsys.readouterr().out)
    trained = json.loads((folder / "evaluation.json").read_text())
    assert trained.keys() == {"frames", "background", "return_mean", "return_std", "returns"}
    assert trained["frames"] >= 30
    assert len(trained["returns"]) == 4

    assert evaluate.main([str(folder), "--episodes", "5", "--json", "--video"]) == 0
    out, error = capsys.readouterr()
    assert re.search(r"evaluating: [34] of 5 episodes", error)
    result = json.loads(out)
    written = json.loads((folder / "evaluation.json").read_text())
    assert written == {"frames": trained["frames"], "background": None, **result}
    with Image.open(folder / "evaluation.gif") as gif:
        assert gif.size == (256, 256)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    assert evaluate.main([str(folder), "--episodes", "1", "--video"]) == 2
    out, error = capsys.readouterr()
    assert "over 1 episodes" in out
    assert "evaluation.json cannot be written (No space" in error
    assert "error: " in error
    assert json.loads((folder / "evaluation.json").read_text()) == written
    assert not list(folder.glob(".*"))


def test_speed_before_the_first_update_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred frames a second while nothing is learned, ten then, by which the time left goes."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    logger = Logger(tmp_path, total_frames=1000, live=False)
    frames = updates = 0
    for turn in range(40):
        learns = turn >= 10
        logger.progress(frames, updates)
        now += 0.1
        frames, updates = frames + (1 if learns else 10), updates + learns
    first = capsys.readouterr().out
    assert "left" not in first
    for _ in range(90):
        logger.progress(frames, updates)
        now += 0.1
        frames, updates = frames + 1, updates + 1
    capsys.readouterr()
    logger.close()
    told = re.search(r"([\d,]+) / 1,000 frames .* (\d+):(\d\d):(\d\d) left", capsys.readouterr().out)
    assert told is not None
    assert int(told[3]) * 60 + int(told[4]) == pytest.approx((1000 - int(told[1])) / 10, abs=1)
