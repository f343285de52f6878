"""What people type: counts, files of options, names of runs; and what is none of it, refused in one sentence."""

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdreamer import commandline, config, evaluate
from fastdreamer.commandline import BadInput, count
from fastdreamer.config import defaults, load_config, options, parse_command
from fastdreamer.probe import __main__ as probe
from fastdreamer.report import __main__ as report
from fastdreamer.run.records import new_run


def parsed(*argv: str) -> dict[str, Any]:
    return options(parse_command(argv, cuda=False)[0].config)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e6", 10**6), ("1M", 10**6), ("400k", 400_000), ("1.5m", 1_500_000), ("2_000", 2000), ("0", 0), ("-3", -3),
     ("1g", 10**9), ("2.5e3k", 2_500_000), ("10.0", 10)],
)  # fmt: skip
def test_counts(text: str, value: int) -> None:
    assert count(text) == value


@pytest.mark.parametrize(
    "text", ["", "k", "1.5", "1e-3", "nan", "inf", "1e99", "1e999999999", "1,5M", "1 M", "0x10", "M1"]
)
def test_no_counts(text: str) -> None:
    with pytest.raises(ValueError, match="no whole number"):
        count(text)


def test_counts_are_taken_by_every_option_that_is_one(tmp_path: Path) -> None:
    # Of views there are 1 or 2.
    whole = [o for o in commandline.options_of(config.Config) if o.kind is int and o.name != "views"]
    assert {"frames", "replay_capacity", "prefill", "eval_every", "envs", "seed", "batch_size"} <= {
        o.name for o in whole
    }
    given = [word for o in whole if o.name != "frames" for word in (o.flag, "0.4k")]
    found = parsed(*given, "--frames", "1M")
    assert {found[o.name] for o in whole} == {400, 1_000_000}
    assert evaluate.main([str(tmp_path), "--episodes", "1e-1"]) == 2


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--frame 3", r"--frame is no option: did you mean --frames\?"),
        ("--no-compil", r"--no-compil is no option: did you mean --no-compile\?"),
        ("-frames 3", r"-frames is no option: did you mean --frames\?"),
        ("--xyzzy", r"--xyzzy is no option: --help lists them"),
        ("--no-frames", r"--no-frames is no option: did you mean --frames\?"),
        ("--preset dmcc", r"--preset dmcc is none of demo, dmc, dmc-small, atari, general: did you mean dmc\?"),
        ("--size m", r"--size m is none of .*: did you mean M\?"),
        ("--size huge", r"--size huge is none of tiny, XS, S, M, L, XL: take one"),
        ("--task", r"--task needs a value: write --task TASK"),
        ("--task --seed 1", r"--task needs a value"),
        ("--task=", r"--task needs a value"),
        ("--seed", r"--seed needs a value: write --seed N"),
        ("--size", r"--size needs a value: write --size tiny\|XS"),
        ("--frames abc", r"--frames abc is no number.*1M or 1e6"),
        ("--frames 1.5", r"--frames 1.5 is no number"),
        ("--gamma high", r"--gamma high is no number"),
        ("--compile=yes", r"--compile takes no value: write --compile or --no-compile"),
        ("dmc/walker_walk", r"dmc/walker_walk belongs to no option: write --task dmc/walker_walk"),
        ("--compile true", r"true belongs to no option: write options as"),
        ("--resume latest --logdir nowhere", r"--resume latest: there is no run under nowhere.*--logdir"),
        ("--resume x --name y", r"--name cannot change in a resumed run"),
        ("--resume x --config y", r"--config cannot change in a resumed run"),
        ("--name a/b", r"--name a/b cannot be the name"),
        ("--name latest", r"--name latest cannot be the name"),
        ("--config nowhere.yaml", r"--config nowhere.yaml cannot be read \(No such file"),
    ],
)
def test_refusals_are_one_sentence_with_the_nearest(argv: str, expected: str) -> None:
    with pytest.raises(BadInput, match=expected) as refusal:
        parse_command(argv.split(), cuda=False)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("main", "argv", "expected"),
    [
        (evaluate.main, "", r"error: name a run folder, as in: python -m fastdreamer\.evaluate"),
        (evaluate.main, "a b", r"error: 'b' is one too many: name a run folder"),
        (evaluate.main, "a --episode 3", r"error: --episode is no option: did you mean --episodes\?"),
        (evaluate.main, "a --device gpu", r"error: --device gpu is none of auto, cpu, cuda"),
        (report.main, "", r"error: name run folders, as in: python -m fastdreamer\.report"),
        (probe.main, "", r"error: name run folders, as in: python -m fastdreamer\.probe"),
        (probe.main, "a --episode 5", r"error: --episode is no option: did you mean --episodes\?"),
        (report.main, "a --plt x", r"error: --plt is no option: did you mean --plot\?"),
        (report.main, "a --plot", r"error: --plot needs a value: write --plot FILE"),
    ],
)
def test_the_other_commands_refuse_alike(
    main: Callable[[list[str]], int], argv: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv.split()) == 2
    error = capsys.readouterr().err
    assert re.match(expected, error), error
    assert error.count("\n") == 1


def test_ways_to_write_an_option() -> None:
    given = parsed("--replay_capacity=5k", "--seed", "1", "--seed", "2", "--behavior-lr", "1e-3", "--no-value-head")
    assert (given["replay_capacity"], given["seed"], given["behavior_lr"]) == (5000, 2, 1e-3)
    assert given["value_head"] is False
    assert parsed("--task", "dmc/walker_walk", "--background", "None")["background"] is None
    with pytest.raises(BadInput, match=r"--entropy is -0\.001"):
        parsed("--entropy", "-1e-3")


def test_options_from_a_run(tmp_path: Path) -> None:
    command, _ = parse_command(["--task", "atari/pong", "--objective", "dreamerv3", "--frames", "7k"], cuda=False)
    record = new_run(tmp_path, "atari/pong", asdict(command.config), "first") / "config.yaml"
    again, why = parse_command(["--config", str(record)], cuda=False)
    assert again.config == command.config
    assert f"as {record} says" in why
    other, _ = parse_command(["--config", str(record), "--frames", "9k", "--objective", "mudreamer"], cuda=False)
    changed = {n for n, v in options(other.config).items() if v != options(command.config)[n]}
    assert changed == {"frames", "objective", *config.OBJECTIVES["mudreamer"]["model"]}
    assert options(other.config)["value_head"] is True


def test_options_from_a_file_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "my options.yaml"
    path.write_text(
        "task: dmc/walker_walk\nframes: 1e6\nenv: {envs: 2}\nreplay-capacity: 200k\ndecoder: off\ncompile: yes"
    )
    given = parsed("--config", str(path), "--envs", "3")
    assert (given["frames"], given["envs"], given["replay_capacity"]) == (10**6, 3, 200_000)
    assert (given["preset"], given["decoder"], given["compile"]) == ("dmc", "off", True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("framse: 3", "framse is no option: did you mean frames"),
        ("frames: many", "frames many is no number"),
        ("frames: [1]", "frames needs one value: write frames: N"),
        ("resume: x", "resume is no option"),
        ("env: {size: M, envz: 2}", "envz is no option: did you mean envs"),
        ("compile: perhaps", "compile is on or off: write true or false instead of perhaps"),
        ("size: null", "size needs one value"),
        ("[", "is no YAML"),
        ("x: !!timestamp no", "is no YAML"),
        ("3", "is no option"),
        ("? [1]", "is no YAML"),
    ],
)
def test_files_that_hold_no_options(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=expected) as refusal:
        parsed("--config", str(path))
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_names_and_the_latest_run(tmp_path: Path) -> None:
    made = [new_run(tmp_path, "a/b", asdict(defaults("demo")), name) for name in ("one", None, "three")]
    assert made[0] == tmp_path / "one"
    with pytest.raises(BadInput, match=r"--name one: .* is there already; .*--resume"):
        parse_command(["--name", "one", "--logdir", str(tmp_path)], cuda=False)
    for second, folder in enumerate((made[2], made[0], made[1])):
        os.utime(folder / "config.yaml", (second, second))
    command, why = parse_command(["--resume", "latest", "--logdir", str(tmp_path), "--frames", "2M"], cuda=False)
    assert command.resume == str(made[1])
    assert str(made[1]) in why
    assert command.config.run.logdir == load_config(made[1]).run.logdir
    assert command.config.run.frames == 2_000_000


@dataclass(frozen=True)
class Untold:
    value: int = 0


@pytest.mark.parametrize("kind", [config.Flags, config.Config, evaluate.Command, report.Command, probe.Command])
def test_every_option_has_a_text(kind: type[Any]) -> None:
    assert [option.name for option in commandline.options_of(kind) if not option.text] == []
    assert [option.name for option in commandline.options_of(Untold) if not option.text] == ["value"]


@pytest.mark.parametrize("argv", [[], ["--task", "atari/pong"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_command([*argv, "--help"], cuda=False)
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "None" not in out
    for option in [*commandline.options_of(config.Flags), *commandline.options_of(config.Config)]:
        assert f"\n  {option.flag} " in out
    assert "\nWorld model" in out
    assert "config." not in re.sub(r"config\.yaml", "", out)
    assert out.rstrip().splitlines()[-6].startswith("  python -m fastdreamer.train ")
    assert f"--frames N  ({400_000 if argv else 30_000})" in out


def test_a_record_can_be_read_as_options(tmp_path: Path) -> None:
    """What is written by one side is taken by the other, for every preset."""
    for name, each in config.PRESETS.items():
        if each.task:
            path = tmp_path / f"{name}.yaml"
            path.write_text(yaml.safe_dump(asdict(each)))
            assert parse_command(["--config", str(path)], cuda=False)[0].config == each
