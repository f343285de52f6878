"""Kernels that a compiled update launches on an H100, counted without one: what was counted once is never to go up.

Whoever makes it less lowers the numbers here. Steps of imagination repeat, so three of them show what fifteen do.
"""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "profiling"
sys.path.insert(0, str(FOLDER))
pretend, updates = (importlib.import_module(name) for name in ("pretend", "updates"))

pytestmark = pytest.mark.thorough


@pytest.fixture
def launches() -> Any:
    """Not before a test wants it: it takes half of a compiler along."""
    return importlib.import_module("launches")


@pytest.mark.skipif(pretend.why_not() is not None, reason=str(pretend.why_not()))
@pytest.mark.parametrize(
    ("objective", "actions", "most"),
    [("mudreamer", "continuous", 338), ("mudreamer", "discrete", 296), ("dreamerv3", "continuous", 328)],
)
def test_an_update_launches_no_more_than_it_did(objective: str, actions: str, most: int) -> None:
    options = ["--size", "S", "--objective", objective, "--actions", actions, "--horizon", "3", "--most", str(most)]
    command = [sys.executable, str(FOLDER / "launches.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    *_, adam, total = [[int(cell) for cell in re.findall(r" (\d+)", line)] for line in done.stdout.splitlines()]
    assert total[-1] == sum(total[:-1]) <= most
    # A norm and a step for each of three networks.
    assert adam[-1] == 6


def test_more_than_allowed_is_said(
    launches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = {"learn_model": {"products": 5, "Inductor's": 3}, "Adam's steps": {"ours": 2}}
    monkeypatch.setattr(pretend, "run", lambda script, options: f"warning\n{json.dumps(counted)}\n")
    path = tmp_path / "launches.json"
    options = ["--json", str(path), "--most"]
    assert updates.failing(launches.main, [*options, "10"]) == 0
    assert re.search(r"^all +5 +0 +3 +2 +0 +10$", capsys.readouterr().out, re.MULTILINE)
    assert json.loads(path.read_text()) == {**counted, "total": 10}
    with pytest.raises(SystemExit) as done:
        updates.failing(launches.main, [*options, "7"])
    # Python prints it and exits with code 1.
    assert done.value.code == "error: an update launches 10 kernels, 3 more than --most 7."


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--horizon", "0"], r"--horizon: 0 is no whole number of at least 1; --help"),
        (["--batch", "16"], r"--batch: expected 2 arguments; --help"),
        (["--json", "missing/x.json"], r"--json missing/x\.json: there is no folder missing; make it first\."),
        ([], r"no GPU can be pretended: there is no C\+\+ compiler: install g\+\+\."),
    ],
)
def test_bad_input_is_one_sentence(
    options: list[str],
    says: str,
    launches: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", "")
    try:
        code = updates.failing(launches.main, options)
    except SystemExit as done:
        code = done.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: {says}.*\n", err)
