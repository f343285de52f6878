"""What the latents of runs hold: `python -m fastdreamer.probe RUN [RUN ...]`."""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastdreamer import commandline
from fastdreamer.config import MAX_SEED, BadInput, Config, check_background, load_config

if TYPE_CHECKING:
    import numpy as np
    import torch

    from fastdreamer.algorithm.agent import Agent
    from fastdreamer.probe.episodes import Episodes
    from fastdreamer.probe.linear import Split


@dataclass(frozen=True)
class Command:
    """Probes the latents of runs of one task in one set of episodes; writes RUN/probe.json and RUN/probe.png."""

    runs: tuple[str, ...]
    """Run folders, such as runs/<task>-<time>."""
    episodes: int = 40
    """Whole episodes, half of them by random actions, the rest by the runs' policies in equal shares."""
    what: str = "state,rollout"
    """WORDS with commas between: state (linear probes of the truth), rollout (error of the prior, rolled), mi (what the
    next image tells of an action, in as many episodes more)."""
    background: str | None = None
    """Folder of videos played behind the frames, or `noise`, instead of the runs' own --eval-background."""
    eval_steps: int = 0
    """Decisions after which an episode is cut; 0 takes the longest of the runs' own --eval-steps."""
    picture: str | None = None
    """PNG file for what the decoders of all runs draw of one episode, below the true frames."""
    seed: int = 0
    """Of the episodes, of who is on which side of the split, and of all noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What the agents run on. `auto`: a CUDA device where there is one."""
    threads: int = 0
    """Threads on a CPU; 0 chooses as the trainer does."""


WORDS = ("state", "rollout", "mi")
SAME = ("obs", "action_repeat", "render", "shown_in_evaluation", "env_args")
"""What runs must have in common of their environments to be compared."""
FLAGS = {"shown_in_evaluation": "--eval-background", "action_repeat": "--action-repeat", "env_args": "--env-args"}
"""The options that are called otherwise."""
IDENTITY = ("task", "frames", "background", "episodes", "seed")
"""What two probes of a run have in common that tell of the same."""
LEAST = 5
"""Episodes of which each side of the split gets one."""
FEW = 10
"""Rows for each feature of s_t below which a probe is told to have too few."""
INTERRUPTED = "interrupted; what was probed so far lies in its run"
FEW_ACTIONS = 1000
"""Rows of the coin below which the bound on what they tell is far too low."""
USAGE = "python -m fastdreamer.probe RUN [RUN ...] [--option value ...]"
EXAMPLES = (
    "python -m fastdreamer.probe runs/<run>",
    "python -m fastdreamer.probe runs/<run> runs/<other> --episodes 100",
    "python -m fastdreamer.probe runs/<run> --what state",
)
FEATURES = {"s": "s_t", "h": "h_t", "z": "z_t", "x": "x_t"}

Table = tuple[str, list[str], list[list[str]]]
"""Title, header and rows."""


def check(command: Command, configs: Sequence[Config]) -> list[str]:
    """The words of `--what`. Raises BadInput for a command that cannot be served and for runs that differ in what they
    were shown."""
    words = [word.strip() for word in command.what.split(",") if word.strip()]
    for word in words:
        if word not in WORDS:
            raise BadInput(f"--what {word} is none of {', '.join(WORDS)}: write some of them with commas between.")
    if not words:
        raise BadInput(f"--what names nothing: write some of {', '.join(WORDS)} with commas between.")
    least = max(LEAST, 2 * len(configs))
    if command.episodes < least:
        raise BadInput(f"--episodes is {command.episodes} and must be at least {least} for {len(configs)} runs.")
    for name in ("eval_steps", "threads"):
        if getattr(command, name) < 0:
            raise BadInput(f"--{name.replace('_', '-')} is {getattr(command, name)} and must be at least 0.")
    if not 0 <= command.seed < MAX_SEED:
        raise BadInput(f"--seed is {command.seed} and must be at least 0 and less than {MAX_SEED}.")
    first = configs[0]
    for path, config in zip(command.runs, configs, strict=True):
        differ = [("--task", first.task, config.task)]
        differ += [(FLAGS.get(n, f"--{n}"), getattr(first.env, n), getattr(config.env, n)) for n in SAME]
        for flag, one, other in differ:
            if one != other:
                raise BadInput(
                    f"{command.runs[0]} has {flag} {one} and {path} has {other}: compare runs that see the same."
                )
    if command.picture is not None:
        picture = Path(command.picture)
        if picture.suffix != ".png" or not picture.parent.is_dir():
            raise BadInput(f"--picture {picture}: name a .png file in a folder that is there.")
        if first.env.obs == "vector" or all(config.model.decoder == "off" for config in configs):
            raise BadInput("--picture needs a run with images and a decoder, and none has one: leave it out.")
    return words


def run_command(command: Command) -> None:
    """Carries the command out. Raises BadInput."""
    from fastdreamer.probe import picture
    from fastdreamer.probe.episodes import collect
    from fastdreamer.probe.linear import split_episodes
    from fastdreamer.run.evaluation import episode_limit, load_agent
    from fastdreamer.run.parts import choose_threads
    from fastdreamer.runtime.device import choose_device, prepare_process
    from fastdreamer.runtime.graphs import Runtime

    runs = [Path(run) for run in command.runs]
    configs = [_shown(load_config(run), command.background) for run in runs]
    words = check(command, configs)
    device = choose_device(command.device)
    config = configs[0]
    prepare_process(device, threads=choose_threads(replace(config, run=replace(config.run, threads=command.threads))))
    loaded = [load_agent(run, config, device) for run, config in zip(runs, configs, strict=True)]
    steps = command.eval_steps or max(map(episode_limit, configs, runs))

    def played(**how: bool) -> "tuple[Episodes, Split]":
        found = collect(
            config,
            [agent for agent, _ in loaded],
            Runtime(device),
            episodes=command.episodes,
            steps=steps,
            seed=command.seed,
            progress=_teller(command.episodes),
            **how,
        )
        return found, split_episodes(found.episode, found.source, command.seed)

    # Without words that want the first set, it would be played for nothing.
    plain = played(told="state" in words) if words != ["mi"] or command.picture else None
    by_coin = played(coin=True) if "mi" in words else None
    results = []
    pictures: list[tuple[str, np.ndarray]] = []
    for run, (agent, frames) in zip(runs, loaded, strict=True):
        _say(f"probing {run}")
        result = {"task": config.task, "frames": frames, "background": config.env.shown_in_evaluation}
        drawn = []
        if plain is not None:
            found, drawn = probe_run(run, agent, *plain, words, command.seed, device)
            result |= found | {"episodes": _described(*plain, command.runs)}
        if by_coin is not None:
            result["mi"] = probe_actions(agent, *by_coin, command.seed, device)
        # The true frames are the same ones.
        pictures += drawn[:1] if not pictures else []
        pictures += [(f"{title}, {run.name}", each) for title, each in drawn[1:]]
        result["seed"] = command.seed
        results.append(result)
        _write(run, result)
    if plain is not None:
        print(_counted(config.task, results[0]["episodes"]) + "\n")
        if (rows := plain[1].fit.sum()) < FEW * loaded[0][0].world_model.rssm.features:
            _say(f"{rows:,} rows to fit on are few for so many features: take more by --episodes")
    if by_coin is not None and results[0]["mi"].get("fit", 0) < FEW_ACTIONS:
        _say("actions by the coin are few to learn from, so that their bound will be low: take more by --episodes")
    for title, header, rows in tables(list(command.runs), results):
        _print(title, header, rows)
    if command.picture is not None:
        _say(f"picture: {picture.draw_frames(Path(command.picture), pictures)}")


def _shown(config: Config, background: str | None) -> Config:
    """With a background of the command's. Raises BadInput."""
    if background is None:
        return config
    check_background(config, "--background", background)
    return replace(config, env=replace(config.env, eval_background=background))


def probe_run(
    run: Path,
    agent: "Agent",
    episodes: "Episodes",
    split: "Split",
    words: Sequence[str],
    seed: int,
    device: "torch.device",
) -> tuple[dict[str, Any], list[tuple[str, "np.ndarray"]]]:
    """What `probe.json` holds of one run: `features`, `controls` and `rollout`, as far as asked for; and what it draws,
    as `picture.drawn` says. Draws `probe.png`."""
    import numpy as np

    from fastdreamer.probe import linear, picture
    from fastdreamer.probe.rollout import observe, rollout
    from fastdreamer.run.parts import build_agent

    tested = np.isin(np.arange(len(episodes.source)), episodes.episode[split.test])

    observed = observe(agent, episodes, device, seed)
    features, truth = observed.features(episodes.real), episodes.truth
    if not all(bool(values.isfinite().all()) for values in features.values()):
        raise BadInput(f"{run}: the latent states of this run are not finite, so its weights are broken: leave it out.")
    found: dict[str, Any] = {}
    maps = {}
    frames = picture.drawn(agent, observed, episodes, int(tested.argmax()))
    if "state" in words:
        probed = {name: linear.probe(values, truth, split) for name, values in features.items()}
        maps = probed["s"].maps
        found["features"] = {name: each.scores for name, each in probed.items()}
        untrained = build_agent(agent.config, agent.spaces, agent.ops, device)
        blank = observe(untrained, episodes, device, seed).features(episodes.real)
        found["controls"] = {
            "untrained": {name: linear.probe(values, truth, split).scores for name, values in blank.items()},
            "shuffled": {"s": linear.probe(features["s"], linear.shuffled(truth, split, seed), split).scores},
        }
        bars = {FEATURES[name]: scores for name, scores in found["features"].items()}
        bars["s_t, untrained"] = found["controls"]["untrained"]["s"]
        try:
            picture.draw(run / "probe.png", f"{run.name}, {agent.config.objective}", frames, bars)
        except BadInput as error:
            # Another user's run can be probed, too.
            _say(str(error))
    elif truth and "rollout" in words:
        # Flags leave no map to follow.
        mapped = {name: values for name, values in truth.items() if values.dtype != bool}
        maps = linear.probe(features["s"], mapped, split).maps
    if "rollout" in words:
        # A background is not the model's to foresee.
        followed = {name: read for name, read in maps.items() if name != "background"}
        found["rollout"] = rollout(agent, observed, episodes, tested, followed, seed)
    return found, frames


def probe_actions(
    agent: "Agent", episodes: "Episodes", split: "Split", seed: int, device: "torch.device"
) -> dict[str, float]:
    """What `mutual_information` says of the coin's actions, in episodes that have some."""
    from fastdreamer.probe.mutual import mutual_information
    from fastdreamer.probe.rollout import observe

    features = observe(agent, episodes, device, seed).features(episodes.real)
    return mutual_information(
        features["x"], features["s"], episodes.rows["action"], episodes.coin, split, agent.spaces.discrete, seed
    )


def tables(names: list[str], results: Sequence[dict[str, Any]]) -> list[Table]:
    """What is printed of the runs: a table a quantity, one row a run."""
    found: list[Table] = []
    first = results[0]
    for name in first.get("features", {}).get("s", {}):
        rows: list[list[str]] = []
        for run, result in zip(names, results, strict=True):
            scores = [result["features"][feature] for feature in FEATURES]
            controls = result["controls"]
            scores += [controls["untrained"]["s"], controls["untrained"]["x"], controls["shuffled"]["s"]]
            rows.append([run, *(_score(each[name]) for each in scores)])
        header = ["run", *FEATURES.values(), "s_t untrained", "x_t untrained", "s_t shuffled"]
        found.append((f"{name}, {_kind(first['features']['s'][name])}", header, rows))
    if "rollout" in first:
        found += _rollouts(names, [result["rollout"] for result in results])
    if first.get("mi"):
        told = [result["mi"] for result in results]
        rows = [
            [
                run,
                f"{_number(mi['nats'])} ({_number(mi.get('low'))}, {_number(mi.get('high'))})",
                _number(mi["without"]),
            ]
            for run, mi in zip(names, told, strict=True)
        ]
        told_of = f"{told[0]['rows']:.0f} rows where a coin chose the action"
        title = f"I(a_{{t-1}}; x_t | s_{{t-1}}): a lower bound in nats, of {told[0]['ceiling']:.2f}, from {told_of}"
        found.append((title, ["run", "with x_t (95 %)", "without it: 0 within error"], rows))
    return found


def _rollouts(names: list[str], rollouts: Sequence[dict[str, dict[str, Any]]]) -> list[Table]:
    from fastdreamer.probe.rollout import SHOWN

    header = ["run", *(f"{k} step{'s' * (k > 1)}" for k in SHOWN)]
    read = list(dict.fromkeys(n for each in rollouts for errors in each.values() for n in errors))
    titles = {
        "kl": "rolled prior: KL of the posterior from it, nats",
        "reward_error": "rolled prior: error of the reward",
        "return_error": "rolled prior: error of the sum of rewards",
    }
    found = []
    for name in read:
        rows = [[run, *(_rolled(each.get(str(k), {}).get(name)) for k in SHOWN)]
                for run, each in zip(names, rollouts, strict=True)]  # fmt: skip
        title = titles.get(name, f"rolled prior: {name} by the probe of s_t (the posterior's own, the start's kept)")
        found.append((title, header, rows))
    return found


def _rolled(value: Any) -> str:
    if isinstance(value, dict):
        return f"{_number(value['rolled'])} ({_number(value['floor'])}, {_number(value['persistence'])})"
    return _number(value)


def _kind(scores: dict[str, float]) -> str:
    if "accuracy" in scores:
        return f"accuracy of a linear probe (always the commonest: {scores['chance']:.2f})"
    if "auroc" in scores:
        return f"balanced accuracy / AUROC of linear probes, mean of {scores['flags']:.0f} flags (no information: 0.50)"
    return "R2 of a linear probe" if scores else "which varies too little to be probed"


def _score(scores: dict[str, float]) -> str:
    if "auroc" in scores:
        return f"{scores['balanced_accuracy']:.2f} / {scores['auroc']:.2f}"
    return _number(scores.get("accuracy", scores.get("r2")))


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def _described(episodes: "Episodes", split: "Split", runs: Sequence[str]) -> dict[str, Any]:
    sides = {name: len(set(episodes.episode[getattr(split, name)].tolist())) for name in ("fit", "choose", "test")}
    random = int((episodes.source == 0).sum())
    return {"count": len(episodes.source), "random": random, "rows": len(episodes.episode), **sides, "runs": list(runs)}


def _counted(task: str, episodes: dict[str, Any]) -> str:
    return (
        f"{task}: {episodes['rows']:,} rows of {episodes['count']} episodes, {episodes['random']} by random actions; "
        f"{episodes['fit']} to fit on, {episodes['choose']} to choose by, {episodes['test']} to test"
    )


def _teller(episodes: int) -> Callable[[int], None]:
    """A `progress` that says every few seconds how many episodes have been played."""
    from fastdreamer.run.logger import PLAIN_INTERVAL

    said = time.monotonic()

    def tell(done: int) -> None:
        nonlocal said
        if time.monotonic() - said >= PLAIN_INTERVAL:
            said = time.monotonic()
            _say(f"playing: {done} of {episodes} episodes")

    return tell


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _write(run: Path, result: dict[str, Any]) -> None:
    """Writes `probe.json`, with what the one before it tells besides of the same weights and episodes."""
    from fastdreamer.run.records import write_whole

    try:
        before = json.loads((run / "probe.json").read_text())
    except (OSError, ValueError):
        before = None
    if isinstance(before, dict) and all(before[n] == result[n] for n in IDENTITY if n in before and n in result):
        result = before | result
    try:
        if "features" not in result:
            (run / "probe.png").unlink(missing_ok=True)
        write_whole(run / "probe.json", (json.dumps(_told(result), indent=1) + "\n").encode())
    except OSError as error:
        _say(f"{run / 'probe.json'} cannot be written ({error.strerror})")


def _told(value: Any) -> Any:
    """Without what is not a number: JSON has none."""
    if isinstance(value, dict):
        told = {name: _told(each) for name, each in value.items()}
        return {name: each for name, each in told.items() if not (isinstance(each, float) and math.isnan(each))}
    return value


def _print(title: str, header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(title)
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: exit code 0; 2 with one sentence for bad input; 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv

    def work() -> None:
        command = commandline.command(Command, argv, usage=USAGE, examples=EXAMPLES)
        with commandline.loading(INTERRUPTED):
            import fastdreamer.probe.episodes
            import fastdreamer.probe.rollout  # noqa: F401
        run_command(command)

    return commandline.ended(work, INTERRUPTED)


if __name__ == "__main__":
    commandline.start(main)
