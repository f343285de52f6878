"""What MuDreamer is for, learned: it does not keep the background that DreamerV3 must draw."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FRAMES = 24_000
"""2,900 updates, some 6 and 9 minutes on a thread each."""


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
def test_the_background_passes_the_posterior_where_it_is_reconstructed(tmp_path: Path) -> None:
    def command(name: str, *arguments: str) -> None:
        subprocess.run([sys.executable, "-m", f"fastdreamer.{name}", *arguments], check=True)

    def train(objective: str) -> Path:
        arguments = f"--preset demo --background noise --objective {objective} --threads 1 --frames {FRAMES}"
        command("train", *arguments.split(), "--logdir", str(tmp_path), "--name", objective)
        return tmp_path / objective

    with ThreadPoolExecutor(2) as both:
        runs = list(both.map(train, ("mudreamer", "dreamerv3")))
    command("probe", *map(str, runs), "--what", "state", "--episodes", "400")
    mudreamer, dreamerv3 = (json.loads((run / "probe.json").read_text())["features"] for run in runs)
    assert mudreamer["s"]["background"]["r2"] < 0.1
    assert dreamerv3["s"]["background"]["r2"] > 0.2
    # It enters both encoders, and both find what matters.
    for features in (mudreamer, dreamerv3):
        assert features["x"]["background"]["r2"] > 0.2
        assert features["s"]["ball_row"]["accuracy"] > 0.8
