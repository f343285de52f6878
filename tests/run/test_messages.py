"""What a run says of its end and of what went wrong: the mend is one that there is."""

import os
import shlex
import signal
from pathlib import Path

import pytest
from runs import GYM, SAMPLES

from fastdreamer import train
from fastdreamer.config import BadInput
from fastdreamer.run.checkpoint import Checkpoints, check_shapes
from fastdreamer.run.logger import Logger
from fastdreamer.run.records import resume_command
from fastdreamer.run.trainer import Trainer


@pytest.fixture(autouse=True)
def _beside_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SAMPLES)


@pytest.mark.parametrize("live", [False, True])
def test_the_last_line_is_a_command_for_the_shell(
    live: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    iterate, init = Trainer.iterate, Logger.__init__

    def stopped(trainer: Trainer) -> None:
        iterate(trainer)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "iterate", stopped)
    monkeypatch.setattr(Logger, "__init__", lambda self, run, **more: init(self, run, **more | {"live": live}))
    for name, value in {"TERM": "xterm", "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        train.main([*GYM, "--logdir", str(tmp_path / "my runs;")])
    assert end.value.code == 128 + signal.SIGTERM
    last = capsys.readouterr().out.splitlines()[-1].removeprefix("\x1b[?25h")  # the cursor is shown again
    assert last.startswith("stopped by SIGTERM; go on with: python -m fastdreamer.train --resume ")
    (folder,) = (tmp_path / "my runs;").iterdir()
    assert shlex.split(last.partition("go on with: ")[2])[-2:] == ["--resume", str(folder)]


def test_a_command_that_is_pasted_names_the_folder_alone(tmp_path: Path) -> None:
    logger = Logger(tmp_path, total_frames=10, live=False)
    assert str(logger._unwritable(OSError(28, "No space left on device"))).endswith(f"with: {resume_command(tmp_path)}")
    logger.close()


def test_no_mend_is_an_option_that_there_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keeper = Checkpoints(tmp_path)
    for step in (1, 2):
        keeper.save(step, {"step": step}, None)
    (keeper.folder / "000000000002" / "state.pt").write_bytes(b"")
    assert Checkpoints(tmp_path).load() == {"step": 1}
    error = capsys.readouterr().err
    assert "state.pt is damaged (0 bytes instead of" in error
    assert "another checkpoint" not in error
    with pytest.raises(BadInput) as refusal:
        check_shapes({"agent.value_head.w": (2,)}, {})
    assert "--" not in str(refusal.value), "--size and the like cannot change in a resumed run"


def test_a_dry_run_begins_with_totals_and_keeps_shapes_for_those_who_ask(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*GYM, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.index("total: ") < out.index("of them encoder ") < out.index("memory of ") < out.index("loss/model")
    assert "\n    " not in out
    assert train.main([*GYM, "--dry-run", "--verbose"]) == 0
    assert "\n    vector." in capsys.readouterr().out
