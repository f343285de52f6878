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
from fastdreamer.report import published
from fastdreamer.run import pictures
from fastdreamer.run.records import METRICS, Series, read_run

BACKGROUND = {"background": "train", "eval_background": "test"}
SUITE = """acrobot_swingup cartpole_balance cartpole_balance_sparse cartpole_swingup cartpole_swingup_sparse cheetah_run
    ball_in_cup_catch finger_spin finger_turn_easy finger_turn_hard hopper_hop hopper_stand pendulum_swingup
    quadruped_run quadruped_walk reacher_easy reacher_hard walker_run walker_stand walker_walk"""
GAMES = """alien amidar assault asterix bank_heist battle_zone boxing breakout chopper_command crazy_climber
    demon_attack freeway frostbite gopher hero jamesbond kangaroo krull kung_fu_master ms_pacman pong private_eye qbert
    road_runner seaquest up_n_down"""


def make_run(
    root: Path, task: str, seed: int, returns: list[float], *, evaluation: float | None = None, env=None, model=None
) -> Path:
    """A run's folder as the trainer leaves it, with an episode every 10 frames."""
    config = defaults("dmc" if task.startswith("dmc/") else "atari" if task.startswith("atari/") else "demo", task)
    config = dataclasses.replace(
        config,
        seed=seed,
        env=dataclasses.replace(config.env, **(env or {})),
        model=dataclasses.replace(config.model, **(model or {})),
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
    header, rows, notes = report.summary([read_run(run) for run in runs])
    return [dict(zip(header, row, strict=True)) for row in rows], "\n".join(notes)


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
        "mudreamer 759.0, dreamerv3 164.7",
        "mudreamer 904.5, dreamerv3 27.9",
        "-",
        "-",
    ]
    assert "as printed: mudreamer 517.0 / 620.0 (from its rows 517.0 / 625.5), dreamerv3 83.6 / 57.1" in notes
    assert "over these 2 tasks, computed here: mudreamer S, natural background 400.0 / 400.0; " in notes
    assert f"mudreamer, published rows {(759.0 + 904.5) / 2:.1f}" in notes
    assert "aggregates over 20 tasks" in notes
    assert "mudreamer 784.7 / 849.6" in notes
    # Nothing was published for states.
    assert "published:" not in cells(runs[3:])[1]
    assert "aggregates over 20 tasks" not in cells(runs[3:])[1]


def test_atari_scores_are_human_normalised(tmp_path):
    runs = [
        make_run(tmp_path, "atari/pong", 0, [1.0], evaluation=-3.0),
        make_run(tmp_path, "atari/kung_fu_master", 0, [1.0], evaluation=22736.0),
    ]
    rows, notes = cells(runs)
    # Half of the way from -21 to 15; exactly the human's.
    assert [row["human-norm."] for row in rows] == ["50%", "100%"]
    assert rows[0]["published"] == "mudreamer 18, dreamerv3 18"
    assert "mudreamer 126% / 43% (from its rows 126% / 34%), dreamerv3 112% / 49%" in notes
    assert "computed here: mudreamer S 75% / 75% (0 above human)" in notes


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
    out = tmp_path / "all.png"
    assert report.main([*map(str, runs), "--plot", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "mean ± std of 2" in printed
    assert "1.50 ± 0.71" in printed
    for picture in (out, *(run / "learning_curve.png" for run in runs)):
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


@pytest.mark.parametrize("kind", ["missing", "no metrics", "empty", "broken config", "plot"])
def test_bad_runs_are_one_sentence_and_code_2(tmp_path, capsys, kind):
    run = make_run(tmp_path, "envpool/Catch-v0", 0, [1.0] * 12)
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
        options = ["--plot", str(tmp_path / "no" / "folder.png")]
    assert report.main([str(run), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert str(run if kind != "plot" else options[1]) in error


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
