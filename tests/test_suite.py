"""The commands of a suite: each would be taken, and together they are the experiment."""

import shlex

import pytest

from fastdreamer import suite
from fastdreamer.config import parse_command
from fastdreamer.report.published import printed_scores


def lines(*words: str, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    assert suite.main(words) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def test_the_published_tables_are_two_suites(capsys: pytest.CaptureFixture[str]) -> None:
    found = lines("dmc20", "--background", "some videos", "--eval-background", "others", "--seeds", "1", capsys=capsys)
    assert len(found) == 20 * 2
    tasks = {parse_command(line[3:], cuda=True)[0].config.task for line in found}
    assert all(printed_scores(task, background=True, pixels=True) for task in tasks)
    games = {parse_command(x[3:], cuda=True)[0].config.task for x in lines("atari26", "--seeds", "1", capsys=capsys)}
    assert len(games) == 26
    assert all(printed_scores(game, background=False, pixels=True) for game in games)


def test_the_sparse_suite_asks_with_a_background_and_without(capsys: pytest.CaptureFixture[str]) -> None:
    found = [parse_command(line[3:], cuda=True)[0].config for line in lines("sparse", "--seeds", "2", capsys=capsys)]
    assert len(found) == 8 * 2 * 9 * 2
    assert len({(c.task, c.env.background, c.objective, c.model, c.aux, c.seed) for c in found}) == len(found)


def test_chosen_methods(capsys: pytest.CaptureFixture[str]) -> None:
    found = lines("demo", "--objectives", "contrast,tpc", "--seeds", "2", capsys=capsys)
    configs = [parse_command(line[3:], cuda=False)[0].config for line in found]
    assert [(c.objective, c.aux.contrast, c.aux.tpc, c.seed) for c in configs] == [
        ("mudreamer", 1, 0, 0), ("mudreamer", 1, 0, 1), ("tpc", 0, 1, 0), ("tpc", 0, 1, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["dmc21"], "dmc21 is no suite: name one of dmc20, atari26, demo, sparse."),
        ([], "name a suite, as in: python -m fastdreamer.suite"),
        (["demo", "--objectives", "mudreamer,dreamer"], "--objectives dreamer is none of mudreamer, "),
        (["demo", "--seeds", "0"], "--seeds is 0 and must be at least 1."),
        (["dmc20", "--background", "videos"], "--background needs --eval-background"),
    ],
)
def test_refusals(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
