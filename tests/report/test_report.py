import csv
import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fastdreamer.config import BadInput, defaults
from fastdreamer.report import __main__ as report
from fastdreamer.report import figures, published
from fastdreamer.report.comparison import Table
from fastdreamer.report.latents import PROBE
from fastdreamer.run import pictures
from fastdreamer.run.records import METRICS, Run, Series, read_run

BACKGROUND = {"background": "train", "eval_background": "test"}
OVER_TWO = "dmc/, natural background: over 2 tasks of the published table"
PAIRS = "Pairs of methods, over the tasks that both have"
WHOLE = "Published, natural backgrounds: 1M frames, 3 seeds, all 20 tasks, as printed (from its rows)"
DMC = published.BACKGROUND_TABLE
SEEDED = ("cheetah_run", "ball_in_cup_catch", "finger_spin", "reacher_easy", "walker_run")
SUITE = """acrobot_swingup cartpole_balance cartpole_balance_sparse cartpole_swingup cartpole_swingup_sparse cheetah_run
    ball_in_cup_catch finger_spin finger_turn_easy finger_turn_hard hopper_hop hopper_stand pendulum_swingup
    quadruped_run quadruped_walk reacher_easy reacher_hard walker_run walker_stand walker_walk"""
GAMES = """alien amidar assault asterix bank_heist battle_zone boxing breakout chopper_command crazy_climber
    demon_attack freeway frostbite gopher hero jamesbond kangaroo krull kung_fu_master ms_pacman pong private_eye qbert
    road_runner seaquest up_n_down"""


def make_run(
    root: Path,
    task: str,
    seed: int,
    returns: list[float],
    *,
    evaluation: float | None = None,
    env=None,
    model=None,
    frames: int | None = None,
) -> Path:
    """A run's folder as the trainer leaves it, with an episode every 10 frames."""
    config = defaults("dmc" if task.startswith("dmc/") else "atari" if task.startswith("atari/") else "demo", task)
    config = dataclasses.replace(
        config,
        seed=seed,
        env=dataclasses.replace(config.env, **(env or {})),
        model=dataclasses.replace(config.model, **(model or {})),
        run=dataclasses.replace(config.run, frames=frames or config.run.frames),
    )
    run = root / f"{task.replace('/', '_')}-{seed}-{len(list(root.iterdir()))}"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"config": dataclasses.asdict(config)}))
    rows: list[dict] = [
        {"frames": 10 * i, "seconds": i, "episode/return": x, "episode/length": 10} for i, x in enumerate(returns, 1)
    ]
    for i, speed in enumerate((1.0, 5.0, 6.0), 1):
        losses = {"loss/reward": 1.0 / i, "loss/actor": -0.5, "loss/model": 9.0, "loss/kl": "nan" if i == 2 else 3.0}
        rows.append({"frames": 10 * i, "updates": i, "seconds": i, "speed/updates": speed, **losses})
    if evaluation is not None:
        rows.append({"frames": 10 * len(returns), "eval/return_mean": evaluation, "eval/return_std": 2.5})
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"frames": 99, "cut')
    return run


def cells(runs: list[Path]) -> tuple[list[dict[str, str]], str]:
    (table, *_), notes = report.summary([read_run(run) for run in runs])
    return entries(table), "\n".join(notes)


def entries(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def statistics_of(runs: list[Path]) -> tuple[dict[str, list[dict[str, str]]], str]:
    """The tables below that of runs, by title, and the notes."""
    (_, *tables), notes = report.summary([read_run(run) for run in runs])
    assert len({table.title for table in tables}) == len(tables)
    return {table.title: entries(table) for table in tables}, "\n".join(notes)


def test_a_row_says_what_the_run_recorded(tmp_path):
    returns = [*range(20), 100.0, *([5.0] * 10)]
    (row,), _ = cells([make_run(tmp_path, "envpool/Catch-v0", 3, returns, evaluation=0.5)])
    assert row["task"] == "envpool/Catch-v0"
    assert row["method"] == "mudreamer tiny"
    assert (row["seed"], row["frames"], row["last"], row["eval"]) == ("3", "310", "5.00", "0.50 ± 2.50")
    # The ten that end with the peak are 11..19 and 100.
    assert row["best"] == f"{(sum(range(11, 20)) + 100) / 10:.1f}"
    assert row["updates/s"] == "5.00"  # the median
    assert row["published"] == "-"


def test_seeds_of_one_method_share_a_mean_and_others_do_not(tmp_path):
    runs = [make_run(tmp_path, "dmc/walker_run", s, [1.0] * 3, evaluation=e) for s, e in ((0, 10.0), (1, 20.0))]
    runs.append(make_run(tmp_path, "dmc/walker_run", 2, [1.0] * 3, evaluation=90.0, model={"action_head": False}))
    rows, _ = cells(runs)
    assert [row["seed"] for row in rows] == ["0", "1", "mean ± std of 2", "2"]
    assert rows[2]["eval"] == f"15.0 ± {statistics.stdev([10, 20]):.2f}"
    assert rows[3]["method"] == "mudreamer S, action_head=False"


def test_background_scores_stand_beside_runs_with_a_background_only(tmp_path):
    runs = [
        make_run(tmp_path, "dmc/walker_walk", 0, [1.0], evaluation=500.0, env=BACKGROUND),
        make_run(tmp_path, "dmc/ball_in_cup_catch", 0, [1.0], evaluation=300.0, env=BACKGROUND),
        make_run(tmp_path, "dmc/walker_walk", 0, [1.0], evaluation=900.0),
        make_run(tmp_path, "dmc/walker_walk", 0, [1.0], evaluation=900.0, env={"obs": "vector"}),
    ]
    rows, notes = cells(runs)
    assert [row["published"] for row in rows] == [
        "tpc 428.3, dreamerpro 736.1, dreamerv3 164.7, mudreamer 759.0",
        "tpc 451.5, dreamerpro 437.5, dreamerv3 27.9, mudreamer 904.5",
        "-",
        "-",
    ]
    assert "aggregates over 20 tasks" in notes
    assert "mudreamer 784.7 / 849.6" in notes
    tables, _ = statistics_of(runs)
    assert list(tables) == [OVER_TWO, PAIRS, WHOLE]
    mine, *published_rows = tables[OVER_TWO]
    assert (mine["method"], mine["runs"], mine["mean"]) == ("mudreamer S, natural background", "2", "400.0")
    assert [row["method"] for row in published_rows] == [f"{name}, published" for name in published.PRINTED[DMC]]
    assert published_rows[-1]["mean"] == f"{(759.0 + 904.5) / 2:.1f}"
    assert tables[WHOLE][-1] == {"method": "mudreamer", "mean": "517.0 (517.0)", "median": "620.0 (625.5)"}
    # Nothing was published for states.
    assert statistics_of(runs[3:])[0] == {}
    assert "aggregates over 20 tasks" not in cells(runs[3:])[1]


def test_atari_scores_are_human_normalised(tmp_path):
    runs = [
        make_run(tmp_path, "atari/pong", 0, [1.0], evaluation=-3.0),
        make_run(tmp_path, "atari/kung_fu_master", 0, [1.0], evaluation=22737.0),
    ]
    rows, notes = cells(runs)
    # Half of the way from -21 to 15; a point above the human's.
    assert [row["human-norm."] for row in rows] == ["50%", "100%"]
    assert rows[0]["published"] == "muzero* -7, efficientzero* 21, simple 13, iris 15, dreamerv3 18, mudreamer 18"
    assert "* searches ahead for each action (lookahead)" in notes
    tables, _ = statistics_of(runs)
    over, _, whole = tables.values()
    assert (over[0]["method"], over[0]["mean"], over[0]["above human"]) == ("mudreamer S", "75%", "1 of 2")
    assert over[0]["optimality gap"] == "25%"
    assert len(over) == len(whole) + 1 == 7
    assert whole[1]["method"] == "efficientzero*"
    assert whole[1]["#Superhuman"] == "13 (14)"
    assert whole[-1] == {
        "method": "mudreamer", "mean": "126% (126%)", "median": "43% (34%)", "#Superhuman": "11 (11)"
    }  # fmt: skip


def test_three_seeds_get_intervals_and_one_gets_none(tmp_path):
    scores = {"walker_run": (100.0, 200.0, 600.0), "cheetah_run": (300.0, 400.0, 500.0)}
    runs = [
        make_run(tmp_path, f"dmc/{task}", seed, [1.0], evaluation=score, env=BACKGROUND)
        for task, seeds in scores.items()
        for seed, score in enumerate(seeds)
    ]
    runs += [
        make_run(tmp_path, f"dmc/{task}", 0, [1.0], evaluation=50.0, env=BACKGROUND, model={"action_head": False})
        for task in scores
    ]
    tables, notes = statistics_of(runs)
    assert list(tables) == [OVER_TWO, OVER_TWO.replace("the published table", "DreamerPro's seeds"), PAIRS, WHOLE]
    three, one, *means = tables[OVER_TWO]
    assert three["runs"] == "6"
    # Of six runs one is cut at each end.
    assert three["IQM"].startswith("350.0 (")
    assert three["mean"].startswith("350.0 (")
    assert three["optimality gap"].startswith("650.0 (")
    assert (one["IQM"], one["mean"], one["optimality gap"]) == ("50.0", "50.0", "950.0")
    assert "No interval where a task has under 3 seeds" in notes
    assert f"fewest seeds of a task: {one['method']} (dmc/, natural background: 1)." in notes
    for row in means:
        assert row["IQM"].endswith(" of task means")
        assert "(" not in "".join(row.values())
    for row in list(tables.values())[1][2:]:
        assert row["method"].endswith(", DreamerPro's seeds, its own videos")
        assert all("(" in row[column] for column in ("IQM", "mean", "median", "optimality gap"))
    pairs = {(row["method"], row["over"]): row for row in tables[PAIRS]}
    better = pairs[three["method"], one["method"]]
    assert (better["probability of improvement"], better["tasks won"]) == ("1.00", "-")
    ours = pairs[three["method"], "tpc, DreamerPro's seeds, its own videos"]
    assert ours["probability of improvement"].startswith(f"{(6 / 9 + 4 / 9) / 2:.2f} (")
    printed = pairs[three["method"], "tpc, published"]
    # 300 against 137.9, but 400 against 440.8.
    assert (printed["tasks"], printed["probability of improvement"], printed["tasks won"]) == ("2", "-", "1")
    assert statistics_of(runs) == (tables, notes)


def test_only_tasks_that_both_have_are_compared(tmp_path):
    runs = [
        make_run(tmp_path, f"dmc/{task}", 0, [1.0], evaluation=score, env=BACKGROUND)
        for task, score in (("walker_walk", 100.0), ("hopper_hop", 200.0), ("fish_swim", 900.0))
    ]
    tables, _ = statistics_of(runs)
    titles = list(tables)
    assert titles == ["dmc/, natural background: over 3 tasks", OVER_TWO, PAIRS, WHOLE]
    assert [(row["mean"], len(tables[title])) for title in titles[:2] for row in tables[title][:1]] == [
        ("400.0", 1),
        ("150.0", 5),
    ]
    assert {row["tasks"] for row in tables[PAIRS]} == {"2"}


def test_plain_runs_stand_beside_plain_seeds(tmp_path):
    runs = [make_run(tmp_path, "dmc/walker_run", s, [1.0], evaluation=800.0) for s in range(3)]
    tables, notes = statistics_of(runs)
    assert list(tables) == ["dmc/: over walker_run of DreamerPro's seeds", PAIRS]
    assert [row["method"] for row in tables[PAIRS]] == ["mudreamer S"] * 3
    assert tables[PAIRS][0]["probability of improvement"].startswith(f"{2 / 3:.2f} (")
    assert "videos" not in notes


def with_background(run: Run, trained: str | None, evaluated: str | None) -> Run:
    env = dataclasses.replace(run.config.env, background=trained, eval_background=evaluated)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, env=env))


def test_noise_backgrounds_stand_beside_nothing_published(tmp_path):
    """Neither scores before videos nor those without distractors are of their kind."""
    runs = [
        read_run(make_run(tmp_path, f"dmc/{task}", s, [1.0], evaluation=500.0))
        for task in ("walker_run", "walker_walk")
        for s in range(3)
    ]
    noisy = [with_background(run, "noise", "noise") for run in runs]
    (table, *tables), notes = report.summary(noisy)
    assert {row["published"] for row in entries(table)} == {"-"}
    assert {row["method"] for row in entries(table)} == {"mudreamer S, noise background"}
    assert [(table.title, len(table.rows)) for table in tables] == [("dmc/, noise background: over 2 tasks", 1)]
    assert "published" not in "".join(notes)
    # Beside others they change nothing of theirs.
    (_, *mixed), _ = report.summary([*runs, *noisy])
    (_, *alone), _ = report.summary(runs)
    assert [table for table in mixed if "noise" not in table.title] == alone
    assert published.printed_of(with_background(noisy[0], "folder", "other")) is not None
    for trained, evaluated, name in (
        (None, None, ""),
        ("noise", None, "noise background"),
        ("folder", "other", "natural background"),
        ("folder", "noise", "natural background, noise while evaluating"),
        (None, "other", "no background, natural while evaluating"),
    ):
        run = with_background(runs[0], trained, evaluated)
        assert run.background == name
        assert run.method == ", ".join(part for part in ("mudreamer S", name) if part)
        assert (published.printed_of(run) is not None) == (name == "natural background")


def test_a_seed_given_twice_is_one_seed(tmp_path):
    runs = [make_run(tmp_path, "dmc/walker_run", s, [1.0], evaluation=e) for s, e in ((0, 1), (1, 2), (0, 3), (2, 4))]
    tables, notes = statistics_of(runs)
    row = next(iter(tables.values()))[0]
    assert (row["runs"], row["mean"].partition(" ")[0]) == ("3", "3.0")
    assert "several runs of seed 0 on dmc/walker_run: of them the last one given counts" in notes
    assert statistics_of(runs[:3])[0] == {}


def test_runs_of_other_lengths_are_other_methods(tmp_path):
    runs = [read_run(make_run(tmp_path, "dmc/walker_run", s, [1.0], evaluation=1.0)) for s in range(6)]
    runs[3:] = [
        dataclasses.replace(
            run, config=dataclasses.replace(run.config, run=dataclasses.replace(run.config.run, frames=7000))
        )
        for run in runs[3:]
    ]
    (_, table, *_), _ = report.summary(runs)
    assert [row["method"] for row in entries(table)[:2]] == [
        "mudreamer S, 1,000,000 frames",
        "mudreamer S, 7,000 frames",
    ]


def test_seeds_are_as_recorded():
    for setting, tasks in (("plain", "cartpole_swingup_sparse"), ("background", "cartpole_swingup")):
        found = published.seed_scores(setting)
        assert list(found) == ["dreamerpro", "tpc", "dreamerv2"]
        for scores in found.values():
            assert list(scores) == [f"dmc/{task}" for task in (tasks, *SEEDED)]
            assert all(each.shape == (3,) for each in scores.values())
    assert found["dreamerv2"]["dmc/walker_run"].tolist() == [29.0, 38.7, 36.3]
    assert published.seed_scores("plain")["tpc"]["dmc/reacher_easy"].tolist() == [285.4, 736.7, 486.5]


def latents_of(runs: list[Path]) -> tuple[list[dict[str, str]], str]:
    tables, notes = report.summary([read_run(run) for run in runs])
    return [row for table in tables if table.title == "latents" for row in entries(table)], "\n".join(notes)


def test_probes_get_a_table_and_a_damaged_one_a_sentence(tmp_path):
    runs = [make_run(tmp_path, "dmc/walker_run", s, [1.0], evaluation=1.0) for s in range(4)]
    assert latents_of(runs)[0] == []
    qpos, qvel = {"r2": 0.9, "chosen": 10}, {"r2": "nan"}
    whole = {
        "frames": 30,
        "seed": 0,
        "features": {"s": {"qpos": qpos, "qvel": qvel, "contact": {}}, "h": {"background": {"r2": 0.5}}},
        "mi": {"nats": 0.25, "low": 0.1},
        "rollout": {"1": {"kl": 2.0}, "5": {"reward_error": 0.5, "qpos": {"rolled": 0.4, "floor": 0.9}}},
    }
    (runs[0] / PROBE).write_text(json.dumps(whole))
    probed = {"s": {"qpos": {"r2": 0.7}, "background": {}}}
    (runs[1] / PROBE).write_text(json.dumps({"frames": 30, "features": probed, "episodes": {"count": 9}}))
    (runs[2] / PROBE).write_text("{}")
    rows, notes = latents_of(runs)
    # What holds nothing is told of in a sentence; what was not probed has no row.
    assert [row["seed"] for row in rows] == ["0", "1", "mean ± std of 2"]
    assert [row["R2 qpos"] for row in rows] == ["0.90", "0.70", f"0.80 ± {0.2 / 2**0.5:.2f}"]
    assert [row["MI"] for row in rows] == ["0.25", "-", "0.25"]
    assert [rows[0][name] for name in ("KL +1", "reward +5", "qpos +5")] == ["2.00", "0.50", "0.40"]
    assert {row["R2 qvel"] for row in rows} == {"-"}
    assert "R2 background" not in rows[0]
    assert "linear probe" in notes
    assert "Not all runs of a task were probed in the same episodes" in notes
    other = make_run(tmp_path, "dmc/hopper_hop", 0, [1.0])
    (other / PROBE).write_text(json.dumps(whole | {"episodes": {"count": 7}}))
    assert "Not all runs" not in latents_of([runs[0], other])[1]
    (runs[1] / PROBE).write_text(json.dumps(whole | {"seed": 1}))
    assert "Not all runs" in latents_of(runs[:2])[1]
    (runs[1] / PROBE).write_text(json.dumps({"frames": 30, "features": probed, "mi": {"nats": "nan"}}))
    assert [row["MI"] for row in latents_of(runs[:2])[0]] == ["0.25", "-", "0.25"]
    for damage in (b"", b"[1]", b"\xff", b'{"features": 3}', b'{"features": {"s": {"qpos": {"r2": "x"}}}}',
                   b'{"features": {"s": {"qpos": 1}}}', b'{"features": {"s": {"qpos": {"r2": [1]}}}}',
                   b'{"features": {"s": {"qpos": {"r2": 1}}}}', b'{"frames": 30, "rollout": []}',
                   b'{"frames": 30, "mi": {"nats": {}}}'):  # fmt: skip
        (runs[1] / PROBE).write_bytes(damage)
        rows, notes = latents_of(runs)
        assert [row["R2 qpos"] for row in rows] == ["0.90"]
        path = runs[1] / PROBE
        assert f"{path} cannot be read (it is no result of a probe): write it again by python -m fastdreamer" in notes


def test_a_probe_of_an_earlier_state_or_another_background_is_in_no_mean(tmp_path):
    runs = [make_run(tmp_path, "dmc/walker_run", s, [1.0] * 3, evaluation=1.0) for s in range(2)]

    def probed(*found: tuple[int, str | None]) -> tuple[list[str], str]:
        for run, (frames, shown) in zip(runs, found, strict=True):
            record = {"frames": frames, "background": shown, "features": {"s": {"qpos": {"r2": frames / 100}}}}
            (run / PROBE).write_text(json.dumps(record))
        rows, notes = latents_of(runs)
        assert "Not all runs" not in notes
        return [f"{row['frames']}: {row['R2 qpos']}" for row in rows], notes

    alike, notes = probed((30, "noise"), (30, "noise"))
    assert alike == ["30: 0.30", "30: 0.30", "30: 0.30 ± 0.00"]
    assert "No mean of probes" not in notes
    stale, notes = probed((30, None), (20, None))
    assert stale == ["30: 0.30", "30 (at 20): 0.20", "30: -"]
    assert notes.count("No mean of probes") == 1
    # Both of an earlier state, even of the same one, are no runs of the frames that the row names.
    assert probed((20, None), (20, None))[0][-1] == "30: -"
    others, notes = probed((30, None), (30, "noise"))
    assert others == ["30: 0.30", "30: 0.30", "30: -"]
    assert notes.count("No mean of probes") == 1


def test_a_task_that_pays_rarely_says_when_it_had_paid_ten_times(tmp_path):
    """Zero is either no discovery or no learning."""
    returns = [0.0] * 5 + [1.0] * 12
    runs = [make_run(tmp_path, "dmc/hopper_hop", s, returns[: len(returns) - 4 * s]) for s in range(2)]
    assert [row["10th rewarded"] for row in cells(runs)[0]] == ["150", "- (8)", "-"]
    dense = make_run(tmp_path, "dmc/walker_walk", 0, returns)
    smooth = make_run(tmp_path, "dmc/acrobot_swingup", 0, [1e-12] * 20)
    assert [row["10th rewarded"] for row in cells([runs[0], dense, smooth])[0]] == ["150", "-", "- (0)"]
    assert "10th rewarded" not in cells([make_run(tmp_path, "dmc/walker_run", 0, returns)])[0][0]


def test_other_tasks_of_one_name_are_other_methods(tmp_path):
    """What is drawn, repeated or built otherwise is no seed of the usual, and is marked beside published scores."""
    runs = [
        make_run(tmp_path, "dmc/walker_run", s, [1.0], evaluation=e, env=env)
        for s, e, env in ((0, 100.0, None), (1, 200.0, {"render": "fast"}), (0, 400.0, {"action_repeat": 4}))
    ]
    rows, notes = cells(runs)
    assert [(row["method"], row["eval"]) for row in rows] == [
        ("mudreamer S", "100.0 ± 2.50"),
        ("mudreamer S, render=fast", "200.0 ± 2.50"),
        ("mudreamer S, action_repeat=4", "400.0 ± 2.50"),
    ]
    assert "several runs of seed 0" not in notes
    arguments = (None, "{}", '{"a": 1, "b": [2]}', '{"b":[2],"a":1}', '{"a": 2}')
    runs = [make_run(tmp_path, "envpool/Catch-v0", s, [1.0], env={"action_repeat": 1}) for s in range(len(arguments))]
    found = [read_run(run) for run in runs]
    for i, text in enumerate(arguments):
        config = found[i].config
        found[i] = dataclasses.replace(
            found[i], config=dataclasses.replace(config, env=dataclasses.replace(config.env, env_args=text))
        )
    assert [run.variant for run in found] == [
        "", "", 'env_args={"a": 1, "b": [2]}', 'env_args={"a": 1, "b": [2]}', 'env_args={"a": 2}'
    ]  # fmt: skip


def test_what_brackets_hold_is_no_markup(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    report._print([Table("", ["task", "method", "seed"], [["gym/x", 'env_args={"a": [null], "b": ["[/]"]}', "0"]])], [])
    assert 'env_args={"a": [null], "b": ["[/]"]}' in capsys.readouterr().out


def test_runs_without_a_finite_score_and_short_ones_get_a_sentence_each(tmp_path):
    whole = [make_run(tmp_path, "dmc/walker_run", s, [1.0] * 3, evaluation=9.0, frames=2050) for s in range(2)]
    for run in whole:
        with open(run / METRICS, "a") as file:
            file.write('\n{"frames": 2050, "eval/return_mean": 9.0}\n')
    _, notes = cells(whole)
    assert "Left out" not in notes
    assert "Not yet trained" not in notes
    nan = make_run(tmp_path, "dmc/walker_run", 2, [1.0], evaluation=float("nan"))
    none = make_run(tmp_path, "dmc/walker_run", 3, [])
    early = [make_run(tmp_path, "dmc/walker_walk", s, [1.0] * 3, frames=5000) for s in range(6)]
    _, notes = cells([*whole, nan, none, *early])
    assert f"Left out of aggregates, for a score that is no finite number: {nan} (nan); {none} (none).\n" in notes
    (line,) = [line for line in notes.splitlines() if line.startswith("Not yet trained for all of their frames")]
    assert f": {early[0]} (30 of 5,000); " in line
    assert line.endswith(f"; {early[3]} (30 of 5,000); and 2 more.")


def test_published_lines_stand_beside_curves_of_their_background_only(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path, _: drawn.append(figure) or path)
    shown = [BACKGROUND, {"background": "noise"}, None]
    runs = [read_run(make_run(tmp_path, "dmc/walker_walk", 0, [1.0] * 30, env=env)) for env in shown]
    for each in (runs, runs[::-1]):
        figures.combined_curve(each, tmp_path / "all.png")
        lines = {panel.get_title("left"): [line.get_label() for line in panel.lines] for panel in drawn.pop().axes}
        published_lines = [f"{name}, published" for name in figures.DRAWN]
        assert lines == {
            "walker_walk\nnatural background": ["mudreamer S, natural background", *published_lines],
            "walker_walk\nnoise background": ["mudreamer S, noise background"],
            "walker_walk\nno background": ["mudreamer S"],
        }
    figures.combined_curve(runs[:1], tmp_path / "all.png")
    assert [panel.get_title("left") for panel in drawn.pop().axes] == ["walker_walk"]


def test_profiles_draw_a_line_and_its_band(tmp_path):
    runs = [
        read_run(make_run(tmp_path, task, s, [1.0], evaluation=score * (s + 1)))
        for task, score in (("dmc/walker_run", 200.0), ("atari/pong", 3.0))
        for s in range(3)
    ]
    out = tmp_path / "profiles.png"

    def coloured(runs: list[Run]) -> float:
        picture = np.asarray(Image.open(figures.profiles(runs, out)).convert("RGB")).astype(int)
        return float((picture.max(-1) - picture.min(-1) > 20).mean())

    lines = coloured(runs[::3])
    assert coloured(runs) > 3 * lines > 0


def test_profiles_need_a_scale(tmp_path, capsys):
    run = make_run(tmp_path, "envpool/Catch-v0", 0, [1.0] * 3)
    assert report.main([str(run), "--profile", str(tmp_path / "profiles.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --profile needs scores with a scale")
    assert error.count("\n") == 1


def test_every_printed_task_is_found_by_the_name_users_give():
    suite, games = SUITE.split(), GAMES.split()
    assert (len(suite), len(games)) == (20, 26)
    found = [published.printed_scores(f"dmc/{task}", background=True, pixels=True) for task in suite]
    found += [published.printed_scores(f"atari/{game}", background=False, pixels=True) for game in games]
    assert None not in found
    rows = [tuple(row.values()) for row in found if row is not None]
    assert len(set(rows)) == 46


def test_printed_means_follow_from_the_rows_and_medians_do_where_the_readme_does_not_say_otherwise():
    name = "dmc20_natural_background_1m"
    table, tasks = published.printed_table(name), published.task_rows(name)
    assert len(tasks) == 20
    for method, printed in table["Mean"].items():
        assert statistics.mean(float(row[method]) for row in tasks.values()) == pytest.approx(float(printed), abs=0.06)
    table, games = published.printed_table("atari100k"), published.task_rows("atari100k")
    assert len(games) == 26
    medians = {}
    for method in ("muzero", "efficientzero", "simple", "iris", "dreamerv3", "mudreamer"):
        scores = [published.human_normalised(float(row[method]), row) for row in games.values()]
        assert statistics.mean(scores) == pytest.approx(float(table["Human Mean"][method].rstrip("%")) / 100, abs=0.02)
        medians[method] = statistics.median(scores) - float(table["Human Median"][method].rstrip("%")) / 100
    assert {method for method, difference in medians.items() if abs(difference) > 0.01} == {"mudreamer"}


def test_curve_has_one_value_where_episodes_end_together():
    frames = np.repeat([10.0, 20.0, 30.0], 4)
    values = np.arange(12.0)
    curve = Series(frames, values).curve()
    assert curve.frames.tolist() == [10, 20, 30]
    assert curve.values.tolist() == [values[:4].mean(), values[:8].mean(), values.mean()]


def test_tables_are_plain_csv():
    for path in (Path(published.__file__).parent / "printed").glob("*.csv"):
        with open(path, newline="") as file:
            lengths = {len(row) for row in csv.reader(file)}
        assert len(lengths) == 1, path


def test_main_prints_redraws_and_combines(tmp_path, capsys):
    runs = [make_run(tmp_path, "dmc/walker_walk", s, [1.0 * s] * 30, env=BACKGROUND) for s in (1, 2)]
    runs.append(make_run(tmp_path, "dmc/hopper_hop", 0, []))
    out, profiles = tmp_path / "all.png", tmp_path / "profiles.png"
    assert report.main([*map(str, runs), "--plot", str(out), "--profile", str(profiles)]) == 0
    printed = capsys.readouterr().out
    assert "mean ± std of 2" in printed
    assert "1.50 ± 0.71" in printed
    for picture in (out, profiles, *(run / "learning_curve.png" for run in runs)):
        assert np.asarray(Image.open(picture).convert("L")).std() > 5


def test_learning_curve_draws_what_was_recorded(tmp_path):
    """Episodes, evaluations and losses each leave their colour; without them it is absent."""

    def share(path: Path, colour: str) -> float:
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        return float((np.abs(np.asarray(Image.open(path).convert("RGB")).astype(int) - wanted).max(-1) < 8).mean())

    returns = [float(x) for x in range(50)]
    full = pictures.learning_curve(read_run(make_run(tmp_path, "envpool/Catch-v0", 0, returns, evaluation=9)))
    empty = pictures.learning_curve(read_run(make_run(tmp_path, "envpool/Catch-v0", 1, [])))
    assert share(full, pictures.RED) > 2e-4
    assert share(empty, pictures.RED) == 0
    assert share(full, pictures.BLUE) > 2 * share(empty, pictures.BLUE) > 0  # the loss is drawn in both


@pytest.mark.parametrize("kind", ["missing", "no metrics", "empty", "broken config", "plot", "profile"])
def test_bad_runs_are_one_sentence_and_code_2(tmp_path, capsys, kind):
    run = make_run(tmp_path, "dmc/walker_run", 0, [1.0] * 12)
    options = []
    if kind == "missing":
        run = tmp_path / "nowhere"
    elif kind == "no metrics":
        (run / METRICS).unlink()
    elif kind == "empty":
        (run / METRICS).write_text("")
    elif kind == "broken config":
        (run / "config.yaml").write_text("config: [")
    else:
        options = [f"--{kind}", str(tmp_path / "no" / "folder.png")]
    assert report.main([str(run), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert str(options[1] if options else run) in error
    assert not options or f"by {options[0]}." in error


def test_dream_marks_context_from_imagination(tmp_path):
    rng = np.random.default_rng(0)
    true = rng.integers(0, 256, (2, 6, 16, 16, 3), np.uint8)
    imagined = true.copy()
    imagined[:, :, :8] = 0
    path = pictures.dream_gif(true, imagined, tmp_path / "dream.gif", context=2, scale=4)
    gif = Image.open(path)
    assert getattr(gif, "n_frames", 1) == 6
    frames = []
    for step in range(6):
        gif.seek(step)
        frames.append(np.asarray(gif.convert("RGB")).astype(int))
    height, width, _ = frames[0].shape
    assert height > 2 * 16 * 4
    assert width > 3 * 16 * 4

    def border(frame, colour):
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        near = np.abs(frame - wanted).max(-1) < 40
        return int(near[:, width // 3 : 2 * width // 3].sum())

    for step, frame in enumerate(frames):
        blue, orange = border(frame, pictures.BLUE), border(frame, pictures.ORANGE)
        assert (blue > 2 * orange) if step < 2 else (orange > 2 * blue)

    # Lower halves agree, so the error there is black; upper halves are the true picture's.
    third = frames[3][:, -(width // 3) + 10 : -10]
    top = [y for y in range(height) if (third[y] > 80).any(-1).mean() > 0.5]
    dark = [y for y in range(height) if (third[y] < 12).all(-1).mean() > 0.9]
    assert len(dark) >= 2 * 8 * 4 - 4
    assert len(top) >= 2 * 8 * 4 - 4


def test_dream_refuses_other_arrays_and_unwritable_folders(tmp_path):
    good = np.zeros((1, 3, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="uint8"):
        pictures.dream_gif(good.astype(np.float32), good, tmp_path / "x.gif", context=1)
    with pytest.raises(BadInput, match="cannot be written"):
        pictures.dream_gif(good, good, tmp_path / "no" / "x.gif", context=1)


def test_gif_keeps_every_frame(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 12, 8, 3), np.uint8)
    gif = Image.open(pictures.gif(frames, tmp_path / "x.gif"))
    assert (getattr(gif, "n_frames", 1), gif.size) == (5, (32, 48))
