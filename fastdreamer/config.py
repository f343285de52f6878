"""Every option of a run, as frozen dataclasses; presets; the trainer's command line."""

import json
import math
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fastdreamer import commandline
from fastdreamer.commandline import BadInput

MAX_SEED = 10**9
"""Seeds lie below; environments of an evaluation are seeded from beyond."""
NOISE = "noise"
"""The background that needs no file."""


@dataclass(frozen=True)
class EnvConfig:
    """How environments are made and stepped."""

    obs: Literal["pixels", "vector", "both"] = "pixels"
    """What the agent sees: 64x64 frames, the state vector, or both."""
    backend: Literal["envpool", "dm_control"] = "envpool"
    """Who simulates `dmc/` tasks."""
    render: Literal["exact", "fast"] = "exact"
    """`fast` draws `dmc/` frames with coarse shadows and no multisampling: for machines without a GPU."""
    background: str | None = None
    """Folder of videos played behind `dmc/` frames while training; or `noise`: moving textures, behind any frames."""
    eval_background: str | None = None
    """As `background`, while evaluating; needed beside a folder of videos. `noise`: textures that no training has."""
    envs: int = 4
    """Environments stepped in parallel (N)."""
    workers: int = 0
    """Processes that share the environments; 0 chooses by task and processor count."""
    action_repeat: int = 2
    """Frames each action is held for; rewards are summed over them."""
    on_nan: Literal["stop", "restart"] = "stop"
    """What an observation or a reward that is not finite does: it ends the run, whose state before it is saved, or it
    closes the episode as a crash does."""
    env_args: str | None = None
    """Keyword arguments of a `gym/` task's constructor, as a JSON object: '{"arena": 3}'."""
    timeout: float = 60.0
    """Seconds without an answer after which an environment process counts as hung and is restarted."""

    @property
    def shown_in_evaluation(self) -> str | None:
        """What is behind the frames of an evaluation."""
        return self.eval_background or (NOISE if self.background == NOISE else None)


@dataclass(frozen=True)
class Size:
    """Widths of the networks, scaled as DreamerV3's table does."""

    deter: int  # D: recurrent state
    channels: int  # of the first convolution, doubled by each of the three that follow
    units: int  # U: hidden units
    layers: int  # hidden layers of each MLP
    stoch: int = 32  # S: categoricals of the latent
    classes: int = 32  # K: classes of each
    bins: int = 255  # of the two-hot heads


SIZES = {
    "tiny": Size(deter=128, channels=4, units=64, layers=1, stoch=8, classes=8, bins=63),
    "XS": Size(deter=256, channels=24, units=256, layers=1),
    "S": Size(deter=512, channels=32, units=512, layers=2),
    "M": Size(deter=1024, channels=48, units=640, layers=3),
    "L": Size(deter=2048, channels=64, units=768, layers=4),
    "XL": Size(deter=4096, channels=96, units=1024, layers=5),
}


@dataclass(frozen=True)
class ModelConfig:
    """The world model's parts; `--objective` sets them together, each flag changes one."""

    value_head: bool = True
    """Predict the lambda-return of real sequences from the latent state."""
    action_head: bool = True
    """Predict the past action from the image embedding and the state before it."""
    decoder: Literal["off", "detached", "attached"] = "off"
    """Reconstruct the observation: not at all, for looking only (no gradient into the latents), or to shape them."""
    batch_norm: Literal["posterior", "encoder", "none"] = "posterior"
    """Where BatchNorm takes LayerNorm's place. The paper says `representation network`; `posterior` is our reading."""
    batch_norm_momentum: float = 0.1
    """Share of a batch in the running means that acting uses."""
    batch_norm_eps: float = 1e-3
    """Added to variances before BatchNorm divides by them."""
    beta_pred: float = 1.0
    """Weight of the prediction losses."""
    beta_dyn: float = 0.95
    """Weight of the KL that trains the prior."""
    beta_rep: float = 0.05
    """Weight of the KL that trains the posterior."""
    free_nats: float = 1.0
    """KL below which the KL losses do not pull any more."""
    unimix: float = 0.01
    """Uniform mixed into every categorical."""
    teacher_ema: float = 0.02
    """Rate at which the value head's teacher follows it, per update. The paper says `slow`; the rate is our reading."""


_WITHOUT_HEADS = {"value_head": False, "action_head": False, "batch_norm": "none"}
OBJECTIVES: dict[str, dict[str, dict[str, Any]]] = {
    "mudreamer": {
        "model": {
            "value_head": True,
            "action_head": True,
            "decoder": "off",
            "batch_norm": "posterior",
            "beta_dyn": 0.95,
            "beta_rep": 0.05,
        },
    },
    "dreamerv3": {
        "model": {
            "value_head": False,
            "action_head": False,
            "decoder": "attached",
            "batch_norm": "none",
            "beta_dyn": 0.5,
            "beta_rep": 0.1,
        },
    },
    "tpc": {
        "model": _WITHOUT_HEADS | {"beta_dyn": 0.1, "beta_rep": 0.1, "free_nats": 0.0},
        "aux": {"tpc": 1.0},
    },
    "dreamerpro": {
        "model": _WITHOUT_HEADS | {"beta_dyn": 0.8, "beta_rep": 0.2},
        "aux": {"prototypes": 1.0, "views": 2},
    },
    "infonce": {
        "model": _WITHOUT_HEADS | {"beta_dyn": 1.0, "beta_rep": 0.1},
        "aux": {"infonce": 1.0},
    },
    "r2dreamer": {
        "model": _WITHOUT_HEADS | {"beta_dyn": 1.0, "beta_rep": 0.1},
        "aux": {"barlow": 1.0},
    },
}
"""What each objective sets, by section; what it does not name stays as the preset has it."""
SET_BY_OBJECTIVES = {name for sections in OBJECTIVES.values() for values in sections.values() for name in values}


@dataclass(frozen=True)
class AuxConfig:
    """Losses beside those of the objective, each on where its weight is not 0; docs/objectives.md says what for."""

    tpc: float = 0.0
    """Weight of temporal predictive coding: each sequence's latents told from the others' by the prior and by
    themselves; it tells backgrounds apart, too."""
    prototypes: float = 0.0
    """Weight of prototypes: two views of a sequence, and its states, agree about which of many it is like."""
    prototypes_freeze: int = 10_000
    """Updates for which the prototypes themselves stay."""
    prototypes_norm: bool = True
    """Keep projections near unit length, as published with backgrounds."""
    sinkhorn_eps: float = 0.0125
    """Softness of the targets' assignment to prototypes."""
    views: int = 1
    """2: each sequence of a batch twice, its images shifted by another part of a few pixels; twice the work."""
    view_shift: float = 3.0
    """Pixels that a view is shifted by at the most, each way."""
    infonce: float = 0.0
    """Weight of InfoNCE between state and image among all rows; it tells backgrounds apart, too."""
    barlow: float = 0.0
    """Weight of Barlow twins of state and image, feature by feature; it keeps backgrounds, too."""
    barlow_offdiag: float = 0.5115
    """Share of the correlations between different features."""
    contrast: float = 0.0
    """Weight of action-conditioned InfoNCE: later images told from the state and the actions between."""
    contrast_negatives: Literal["actions", "time", "batch", "all"] = "actions"
    """What the true pair is told from: other actions rewards only what actions change; `batch`, `time` and `all` invite
    the background into the latents."""
    contrast_steps: int = 1
    """Steps between state and image, from 1 to this."""
    contrast_samples: int = 15
    """Other action sequences that the true one is among."""
    bisim: float = 0.0
    """Weight of bisimulation: latents as far apart as their rewards and futures; beside other heads only."""
    bisim_discount: float = 0.9
    """Share of the future in how far apart latents should be."""
    consistency: float = 0.0
    """Weight of forward consistency: the prior, rolled several steps, meets the posteriors."""
    consistency_steps: int = 3
    """Steps that the prior is rolled, 2 at least."""
    consistency_decay: float = 0.5
    """Weight of each step as a share of that of the one before."""
    consistency_divergence: Literal["kl", "js"] = "kl"
    """From posterior to prior: KL less the free nats, or Jensen-Shannon, which is bounded."""
    jacobian: float = 0.0
    """Weight of controllability: every direction of the action visible in the next recurrent state."""
    jacobian_rows: int = 64
    """States an update looks at for it."""
    jacobian_sigma: float = 0.3
    """Noise against which an action has to be visible."""


@dataclass(frozen=True)
class BehaviorConfig:
    """Actor and critic, learned in imagination."""

    horizon: int = 15
    """Imagined steps (H)."""
    gamma: float = 0.997
    """Discount of rewards a step."""
    lam: float = 0.95
    """Lambda of the returns: 0 trusts the critic at once, 1 the imagined rewards to the end."""
    entropy: float = 3e-4
    """Weight of the actor's entropy."""
    actor_gradient: Literal["auto", "dynamics", "reinforce"] = "auto"
    """`auto`: through the model's dynamics for continuous actions, REINFORCE for discrete ones."""
    imagined_cont: Literal["mode", "probability"] = "mode"
    """What imagined returns and weights continue by: whether the continue head thinks an episode goes on, or how likely
    it thinks so; neither passes a gradient on."""
    ema: float = 0.02
    """Rate at which the slow critic follows, per update."""
    return_decay: float = 0.99
    """EMA of the range of imagined returns that scales advantages; the range starts at 0."""


@dataclass(frozen=True)
class OptimConfig:
    """What an update sees, and its three optimisers."""

    batch_size: int = 16
    """Sequences (B)."""
    batch_length: int = 64
    """Steps of each (T)."""
    model_lr: float = 1e-4
    """Learning rate of the world model."""
    model_eps: float = 1e-8
    """Epsilon of the world model's Adam."""
    model_clip: float = 1000.0
    """Norm to which the world model's gradient is clipped."""
    behavior_lr: float = 3e-5
    """Learning rate of the actor and of the critic."""
    behavior_eps: float = 1e-5
    """Epsilon of their Adam."""
    behavior_clip: float = 100.0
    """Norm to which each one's gradient is clipped."""


@dataclass(frozen=True)
class ReplayConfig:
    replay_capacity: int = 1_000_000
    """Steps kept."""
    replay_device: Literal["auto", "cpu"] = "auto"
    """`auto`: on the device that trains, if it has room. `cpu`: in host memory, pinned where there is CUDA."""
    prefill: int = 1024
    """Decisions taken at random before the first update."""
    train_ratio: float = 512
    """Replayed steps for each decision after `prefill`: an update replays batch-size x batch-length."""


@dataclass(frozen=True)
class RunConfig:
    frames: int = 1_000_000
    """Environment frames to train for (decisions times action repeat)."""
    eval_every: int = 0
    """Frames between evaluations; 0 evaluates at the end alone."""
    eval_episodes: int = 10
    """Whole episodes of an evaluation."""
    eval_steps: int = 0
    """Decisions after which an evaluation cuts an episode; 0: ten times the longest in training, at least 10,000."""
    checkpoint_every: float = 300.0
    """Seconds between checkpoints."""
    log_every: int = 50
    """Updates between log lines; metrics are means over them."""
    logdir: str = "runs"
    """Folder in which runs get folders of their own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What trains. `auto`: a CUDA device where there is one."""
    threads: int = 0
    """Threads of the trainer's own work on a CPU; 0 chooses by size and by what environment workers need."""
    kernels: Literal["auto", "reference", "fused"] = "auto"
    """Of the hot operations: Triton kernels or plain PyTorch. `auto`: fused where there is a CUDA device."""
    compile: bool = False
    """On a GPU compile the update and capture it as one graph; on a CPU compile its elementwise operations."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of products and convolutions. `auto`: bf16 where the device multiplies it faster, but for the atari preset; on a
    CPU with --compile only, from --size XS on."""


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    preset: Literal["demo", "dmc", "dmc-small", "atari", "general"]
    """Defaults for a kind of task; chosen by `--task` (or by whether there is a GPU) unless given."""
    task: str
    """Task: dmc/<domain>_<task>, atari/<game>, envpool/<Id>, gym/<Id> or gym/<module>:<Id>; synthetic/continuous or
    synthetic/discrete for rows that cost nothing."""
    size: Literal["tiny", "XS", "S", "M", "L", "XL"] = "S"
    """Widths and depths of all networks."""
    objective: Literal["mudreamer", "dreamerv3", "tpc", "dreamerpro", "infonce", "r2dreamer"] = "mudreamer"
    """Sets the heads, the norm, the KL weights and further losses together."""
    seed: int = 0
    """Of weights, environments and all noise: on a CPU a run repeats bit for bit."""
    env: EnvConfig = field(default_factory=EnvConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    aux: AuxConfig = field(default_factory=AuxConfig)
    behavior: BehaviorConfig = field(default_factory=BehaviorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def widths(self) -> Size:
        return SIZES[self.size]


_NETWORKS = "weights and optimisers are of these networks"
_NEXT_UPDATE = "from the next update on"
_NEXT_PROCESS = "how this process works, and no part of what is learned"
FIXED_ON_RESUME = {
    "preset": "it gave defaults that the run has long recorded",
    "task": "networks, replay and environments are of its spaces",
    "size": _NETWORKS,
    "objective": _NETWORKS,
    "seed": "the randomness so far is drawn from it",
    "obs": "networks and replay hold these observations",
    "envs": "replay and environments are of so many streams",
    "env_args": "environments are made with them",
    "workers": "environments come back in the processes that they were saved in",
    "action_repeat": "frames so far are counted by it",
    "value_head": _NETWORKS,
    "action_head": _NETWORKS,
    "decoder": _NETWORKS,
    "batch_norm": _NETWORKS,
    **dict.fromkeys(("prototypes", "infonce", "barlow", "contrast", "contrast_steps"), _NETWORKS),
    "replay_capacity": "the stored rows lie in a ring of this size",
    "prefill": "updates so far are counted from its end",
    "train_ratio": "updates so far are counted by it",
    "logdir": "the run's folder is where it is",
}
"""Options that a resumed run keeps, by their names as fields, and why."""
FREE_ON_RESUME = {
    "backend": "environments begin new episodes, simulated by the other one",
    "render": "environments begin new episodes, drawn the other way",
    "background": "the folder may have moved, but noise stays noise; environments begin new episodes",
    "eval_background": "the folder may have moved",
    "timeout": _NEXT_PROCESS,
    "on_nan": _NEXT_PROCESS,
    "batch_norm_momentum": _NEXT_UPDATE,
    "batch_norm_eps": _NEXT_UPDATE,
    "beta_pred": _NEXT_UPDATE,
    "beta_dyn": _NEXT_UPDATE,
    "beta_rep": _NEXT_UPDATE,
    "free_nats": _NEXT_UPDATE,
    "unimix": _NEXT_UPDATE,
    "teacher_ema": _NEXT_UPDATE,
    **dict.fromkeys(
        (
            "tpc",
            "prototypes_freeze",
            "prototypes_norm",
            "sinkhorn_eps",
            "views",
            "view_shift",
            "barlow_offdiag",
            "contrast_negatives",
            "contrast_samples",
            "bisim",
            "bisim_discount",
            "consistency",
            "consistency_steps",
            "consistency_decay",
            "consistency_divergence",
            "jacobian",
            "jacobian_rows",
            "jacobian_sigma",
        ),
        _NEXT_UPDATE,
    ),
    "horizon": _NEXT_UPDATE,
    "gamma": _NEXT_UPDATE,
    "lam": _NEXT_UPDATE,
    "entropy": _NEXT_UPDATE,
    "actor_gradient": _NEXT_UPDATE,
    "imagined_cont": _NEXT_UPDATE,
    "ema": _NEXT_UPDATE,
    "return_decay": _NEXT_UPDATE,
    "batch_size": "replayed steps are counted, so the train ratio holds whatever an update replays",
    "batch_length": "replayed steps are counted, so the train ratio holds whatever an update replays",
    "model_lr": _NEXT_UPDATE,
    "model_eps": _NEXT_UPDATE,
    "model_clip": _NEXT_UPDATE,
    "behavior_lr": _NEXT_UPDATE,
    "behavior_eps": _NEXT_UPDATE,
    "behavior_clip": _NEXT_UPDATE,
    "replay_device": _NEXT_PROCESS,
    "frames": "further than planned, or less far, but not less than the run has come to",
    "eval_every": "from the next evaluation on",
    "eval_episodes": "from the next evaluation on",
    "eval_steps": "from the next evaluation on",
    "checkpoint_every": _NEXT_PROCESS,
    "log_every": "from the next log line on",
    "device": "on another kind of device noise is drawn anew",
    "threads": _NEXT_PROCESS,
    "kernels": _NEXT_PROCESS,
    "compile": _NEXT_PROCESS,
    "precision": _NEXT_PROCESS,
}
"""All other options: a resumed run may be given another value, and what that changes."""


PRESETS: dict[str, Config] = {
    # Learns Catch from pixels within minutes on two cores: a tiny model, hence ten times the usual learning rates.
    "demo": Config(
        preset="demo",
        task="envpool/Catch-v0",
        size="tiny",
        env=EnvConfig(envs=8, action_repeat=1),
        model=ModelConfig(decoder="detached"),
        behavior=BehaviorConfig(horizon=8, entropy=3e-3),
        optim=OptimConfig(batch_length=10, model_lr=1e-3, behavior_lr=3e-4),
        replay=ReplayConfig(replay_capacity=40_000, prefill=800, train_ratio=20),
        run=RunConfig(frames=30_000, eval_episodes=100),
    ),
    "dmc": Config(preset="dmc", task="dmc/walker_walk"),
    # What a CPU learns of a DeepMind Control task overnight: frames drawn fast, a short horizon, updates of 256 steps.
    "dmc-small": Config(
        preset="dmc-small",
        task="dmc/cartpole_balance",
        size="tiny",
        env=EnvConfig(render="fast", action_repeat=4),
        behavior=BehaviorConfig(horizon=12, gamma=0.985, entropy=1e-3),
        optim=OptimConfig(batch_length=16, model_lr=1e-3, behavior_lr=1e-3),
        replay=ReplayConfig(train_ratio=256),
        run=RunConfig(frames=100_000),
    ),
    "atari": Config(
        preset="atari",
        task="atari/pong",
        env=EnvConfig(envs=1, action_repeat=4),
        replay=ReplayConfig(train_ratio=1024),
        run=RunConfig(frames=400_000),
    ),
    "general": Config(preset="general", task="", env=EnvConfig(action_repeat=1)),
}


def choose_preset(preset: str | None, task: str | None, cuda: bool) -> tuple[str, str]:
    """The preset's name, and the sentence that says why it was taken."""
    if preset is not None:
        return preset, "as --preset says"
    if task is not None:
        family = task.split("/")[0]
        name = family if family in ("dmc", "atari") else "general"
        return name, f"because --task is {task}; --preset takes another"
    if cuda:
        return "dmc", "because there is a CUDA device; take another with --preset demo|dmc|dmc-small|atari or --task"
    return "demo", "because there is no CUDA device; take another with --preset demo|dmc|dmc-small|atari or --task"


def defaults(preset: str, task: str | None = None, objective: str = "mudreamer") -> Config:
    """The configuration of a preset with a task and an objective set, before any other flag."""
    base = PRESETS[preset]
    if not (task or base.task):
        raise BadInput("--preset general has no task of its own: name one, such as --task gym/CartPole-v1.")
    sections = {}
    if objective != "mudreamer":
        sections = {name: replace(getattr(base, name), **values) for name, values in OBJECTIVES[objective].items()}
    return replace(base, task=task or base.task, objective=objective, **sections)


@dataclass(frozen=True)
class Flags:
    """Options of the command and not of a run: what it does, with which run."""

    resume: str | None = None
    """Run folder to go on with, whose record gives the defaults of all options; `latest`: the run under --logdir that
    was started or resumed last."""
    config: str | None = None
    """File of options (YAML), such as a run's config.yaml; those on the command line win."""
    name: str | None = None
    """Name of the run's folder under --logdir, instead of task and time."""
    run: str | None = None
    """Folder of the run: begins it there, goes on from its last checkpoint, or does nothing where it is done. So the
    command can be repeated until its exit code is 0."""
    die_with_parent: bool = False
    """Save and stop when the process that started this one dies (Linux)."""
    dry_run: bool = False
    """Build everything, print parameters, memory and one update's losses, and exit."""
    verbose: bool = False
    """With --dry-run: print the shape of every parameter too."""


@dataclass(frozen=True)
class Command:
    """What the trainer is to do: `resume` a run folder, or start one, of a `name` perhaps, or whatever is left to do in
    the folder `run`."""

    config: Config
    resume: str | None = None
    name: str | None = None
    run: str | None = None
    die_with_parent: bool = False
    dry_run: bool = False
    verbose: bool = False


TITLES = {
    "flags": "What to do",
    "": "What to train",
    "env": "Environments",
    "model": "World model (--objective sets its parts together, each option here changes one)",
    "aux": "Losses beside them (each is on where its weight is not 0)",
    "behavior": "Actor and critic, learned in imagination",
    "optim": "Updates and optimisers",
    "replay": "Replay of past steps",
    "run": "Length, records and use of this machine",
}
"""Of the sections of a configuration, as the help names them."""
USAGE = "python -m fastdreamer.train [--option value ...]"
EXAMPLES = (
    "python -m fastdreamer.train                                     # the preset that suits this machine",
    "python -m fastdreamer.train --task dmc/cheetah_run --seed 1 --frames 500k --compile",
    "python -m fastdreamer.train --task gym/my_envs:Reach-v0 --obs vector --name reach",
    "python -m fastdreamer.train --config runs/reach/config.yaml --seed 2 --name reach-2",
    "python -m fastdreamer.train --resume latest --frames 2M",
    "python -m fastdreamer.train --run runs/walker-0 --task dmc/walker_walk  # again and again, until it is done",
    "python -m fastdreamer.train --dry-run --task dmc/walker_walk    # what it would be and take",
)


def parse_command(argv: Sequence[str], *, cuda: bool) -> tuple[Command, str]:
    """Reads the command line of the trainer: the command, and the sentence that says which preset was taken and why.

    `--preset`, `--task` and `--objective` set the defaults that every other option then changes. Raises BadInput, and
    SystemExit (code 0) where help is asked for.
    """
    of_flags, of_config = commandline.options_of(Flags, "flags"), commandline.options_of(Config)
    given, words = commandline.read(argv, [*of_flags, *of_config])
    if words:
        mend = f"--task {words[0]}" if "/" in words[0] else "options as --name value"
        raise BadInput(f"{words[0]} belongs to no option: write {mend}.")
    flags = commandline.put(Flags(), given)
    in_file, resumed = {}, None
    for name in ("resume", "logdir", "name"):
        if flags.run is not None and name in given:
            raise BadInput(f"--{name} cannot go with --run, which names the run's folder and goes on by itself.")
    if flags.resume is not None:
        for name in ("preset", "objective", "task", "name", "config"):
            if name in given:
                raise BadInput(
                    f"--{name} cannot change in a resumed run: leave it out, or start a run without --resume."
                )
        resumed = Path(flags.resume)
        if flags.resume == "latest":
            resumed = latest_run(Path(given.pop("logdir", RunConfig().logdir)))
        default, why = load_config(resumed), f"as the run {resumed} was started"
    else:
        if flags.config is not None:
            in_file = commandline.read_file(Path(flags.config), of_config)
        if given.get("objective", in_file.get("objective")) != in_file.get("objective"):
            in_file = {name: value for name, value in in_file.items() if name not in SET_BY_OBJECTIVES}
        chosen = in_file | given
        preset, why = choose_preset(chosen.get("preset"), chosen.get("task"), cuda)
        if "preset" in in_file and "preset" not in given:
            why = f"as {flags.config} says"
        default = defaults(preset, chosen.get("task"), chosen.get("objective", "mudreamer"))
    if given.get("help"):
        titled = {title: [o for o in [*of_flags, *of_config] if o.section == s] for s, title in TITLES.items()}
        text = "Trains a world-model agent. Counts may be written 400k, 1M or 1e6. "
        text += f"Defaults stand in brackets: of preset {default.preset}, {why}."
        print(commandline.listing(USAGE, text, titled, options(default) | options(Flags()), EXAMPLES))
        raise SystemExit(0)
    config = commandline.put(default, in_file | given)
    if resumed is not None:
        _check_resumed(default, config)
    check(config)
    if flags.run is not None and (Path(flags.run) / "config.yaml").exists():
        _check_resumed(load_config(Path(flags.run)), config)
    _check_name(flags.name, Path(config.run.logdir))
    command = Command(
        config,
        resume=None if resumed is None else str(resumed),
        name=flags.name,
        run=flags.run,
        die_with_parent=flags.die_with_parent,
        dry_run=flags.dry_run,
        verbose=flags.verbose,
    )
    return command, f"preset {config.preset} ({config.task}, size {config.size}) {why}"


def check_background(config: Config, flag: str, shown: str | None) -> None:
    """Raises BadInput, naming `flag`, where the task cannot have `shown` behind its frames."""
    if shown is None:
        return
    if config.env.obs == "vector":
        raise BadInput(f"{flag} needs frames: use --obs pixels, or leave it out.")
    if shown != NOISE and not config.task.startswith("dmc/"):
        raise BadInput(
            f"{flag} {shown}: videos are for dmc/ tasks and the task is {config.task}; use {flag} {NOISE} for moving "
            "textures, or leave it out."
        )


def _check_name(name: str | None, root: Path) -> None:
    if name is None:
        return
    if name in (".", "..", "latest") or "/" in name or "\0" in name:
        raise BadInput(f"--name {name} cannot be the name of a run's folder: take letters, digits, dots and dashes.")
    if (root / name).exists():
        raise BadInput(
            f"--name {name}: {root / name} is there already; take another name, or go on with --resume {root / name}."
        )


def latest_run(root: Path) -> Path:
    """The run's folder under `root` that was started or resumed last. Raises BadInput where there is none."""
    runs = sorted(root.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime_ns)
    if not runs:
        raise BadInput(f"--resume latest: there is no run under {root}; name the folder of your runs by --logdir.")
    return runs[-1].parent


def check(config: Config) -> None:
    """Raises BadInput for options that contradict each other or are out of range."""
    env, model, aux, dmc = config.env, config.model, config.aux, config.task.startswith("dmc/")
    if "/" not in config.task:
        raise BadInput(f"--task {config.task} has no family: write dmc/, atari/, envpool/ or gym/ before the name.")
    for flag, given in (("--backend dm_control", env.backend == "dm_control"), ("--render fast", env.render == "fast")):
        if given and not dmc:
            raise BadInput(f"{flag} is for dmc/ tasks and --task is {config.task}: leave it out.")
    if env.env_args is not None:
        if not config.task.startswith("gym/"):
            raise BadInput(f"--env-args is for gym/ tasks and --task is {config.task}: leave it out.")
        constructor_arguments(env.env_args)
    for flag, folder in (("--background", env.background), ("--eval-background", env.eval_background)):
        check_background(config, flag, folder)
    if env.background is not None and env.shown_in_evaluation is None:
        raise BadInput(
            "--background needs --eval-background with other videos: evaluation must not see those trained on."
        )
    videos = env.background not in (None, NOISE)
    if videos and Path(env.background or "").resolve() == Path(env.eval_background or "").resolve():
        raise BadInput("--eval-background is the folder of --background: name a folder of other videos.")
    if env.obs == "vector" and env.render == "fast":
        raise BadInput("--render fast needs frames: leave it out, or use --obs pixels.")
    if model.batch_norm == "encoder" and env.obs == "vector":
        raise BadInput("--batch-norm encoder is for images: use --obs pixels, or --batch-norm posterior.")
    if model.batch_norm == "posterior" and config.optim.batch_size == 1:
        raise BadInput(
            "--batch-size 1 leaves BatchNorm one row to normalise by, of which nothing is left: use at least 2 (16 is "
            "usual), or --batch-norm none."
        )
    if aux.views not in (1, 2):
        raise BadInput(f"--views is {aux.views} and must be 1 or 2.")
    if aux.views == 2 and env.obs == "vector":
        raise BadInput("--views 2 shifts images: use --obs pixels, or --views 1.")
    if aux.prototypes and aux.views != 2:
        raise BadInput("--prototypes compares two views of a sequence: add --views 2.")
    if aux.prototypes and model.batch_norm == "encoder":
        raise BadInput(
            "--prototypes keeps a slow copy of the encoder, where BatchNorm cannot be: use --batch-norm none."
        )
    if not 0 <= config.seed < MAX_SEED:
        raise BadInput(f"--seed is {config.seed} and must be at least 0 and less than {MAX_SEED}.")
    positive = {
        "--envs": env.envs,
        "--action-repeat": env.action_repeat,
        "--timeout": env.timeout,
        "--batch-size": config.optim.batch_size,
        "--horizon": config.behavior.horizon,
        "--train-ratio": config.replay.train_ratio,
        "--frames": config.run.frames,
        "--eval-episodes": config.run.eval_episodes,
        "--checkpoint-every": config.run.checkpoint_every,
        "--log-every": config.run.log_every,
        "--model-lr": config.optim.model_lr,
        "--behavior-lr": config.optim.behavior_lr,
        "--model-eps": config.optim.model_eps,
        "--behavior-eps": config.optim.behavior_eps,
        "--model-clip": config.optim.model_clip,
        "--behavior-clip": config.optim.behavior_clip,
        "--batch-norm-eps": model.batch_norm_eps,
        "--unimix": model.unimix,
        "--contrast-steps": aux.contrast_steps,
        "--contrast-samples": aux.contrast_samples,
        "--jacobian-rows": aux.jacobian_rows,
        "--jacobian-sigma": aux.jacobian_sigma,
        "--sinkhorn-eps": aux.sinkhorn_eps,
    }
    for flag, value in positive.items():
        if not 0 < value < math.inf:
            raise BadInput(f"{flag} is {value} and must be more than 0, and finite.")
    at_least_zero = {
        "--workers": env.workers,
        "--threads": config.run.threads,
        "--eval-every": config.run.eval_every,
        "--eval-steps": config.run.eval_steps,
        "--entropy": config.behavior.entropy,
        "--free-nats": model.free_nats,
        "--beta-pred": model.beta_pred,
        "--beta-dyn": model.beta_dyn,
        "--beta-rep": model.beta_rep,
        "--tpc": aux.tpc,
        "--prototypes": aux.prototypes,
        "--prototypes-freeze": aux.prototypes_freeze,
        "--view-shift": aux.view_shift,
        "--infonce": aux.infonce,
        "--barlow": aux.barlow,
        "--barlow-offdiag": aux.barlow_offdiag,
        "--contrast": aux.contrast,
        "--bisim": aux.bisim,
        "--consistency": aux.consistency,
        "--jacobian": aux.jacobian,
    }
    for flag, value in at_least_zero.items():
        if not 0 <= value < math.inf:
            raise BadInput(f"{flag} is {value} and must be at least 0, and finite.")
    fractions = {
        "--gamma": config.behavior.gamma,
        "--lam": config.behavior.lam,
        "--ema": config.behavior.ema,
        "--teacher-ema": model.teacher_ema,
        "--return-decay": config.behavior.return_decay,
        "--unimix": model.unimix,
        "--batch-norm-momentum": model.batch_norm_momentum,
        "--bisim-discount": aux.bisim_discount,
        "--consistency-decay": aux.consistency_decay,
    }
    for flag, value in fractions.items():
        if not 0 <= value <= 1:
            raise BadInput(f"{flag} is {value} and must lie between 0 and 1.")
    length, replay = config.optim.batch_length, config.replay
    if length < 2:
        raise BadInput(f"--batch-length is {length} and must be at least 2: a row alone has nothing to predict.")
    if aux.consistency_steps < 2:
        raise BadInput(
            f"--consistency-steps is {aux.consistency_steps} and must be at least 2: the first step is the objective's."
        )
    ahead = {"--contrast-steps": (aux.contrast, aux.contrast_steps)}
    ahead |= {"--consistency-steps": (aux.consistency, aux.consistency_steps)}
    for flag, (weight, steps) in ahead.items():
        if weight and steps >= length:
            raise BadInput(f"{flag} is {steps} and must be less than --batch-length ({length}): lower it.")
    if replay.prefill < length:
        raise BadInput(
            f"--prefill is {replay.prefill}, less than a sequence: make it at least --batch-length ({length})."
        )
    first = replay.prefill * env.action_repeat
    if config.run.frames <= first:
        raise BadInput(
            f"--frames is {config.run.frames} and --prefill takes the first {first} (in decisions: {replay.prefill}), "
            "so that no update would be made: raise the one or lower the other."
        )
    if replay.replay_capacity < max(replay.prefill, env.envs):
        raise BadInput(
            f"--replay-capacity is {replay.replay_capacity}: make it at least --prefill ({replay.prefill}) "
            f"and --envs ({env.envs})."
        )


def constructor_arguments(text: str | None) -> dict[str, Any]:
    """What `--env-args` says. Raises BadInput for what is no JSON object."""
    try:
        arguments = json.loads(text or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise BadInput(f"--env-args {text} is no JSON object: write it as '{{\"arena\": 3}}'.")
    return arguments


def options(config: Any) -> dict[str, Any]:
    """Every option by its name as a field: what the sections of a configuration hold, side by side."""
    found: dict[str, Any] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        found |= options(value) if is_dataclass(value) else {each.name: value}
    return found


def _check_resumed(before: Config, now: Config) -> None:
    """Raises BadInput for options whose change would falsify what the run has done so far."""
    old, new = options(before), options(now)
    for name, why in FIXED_ON_RESUME.items():
        if old[name] != new[name]:
            flag = f"--{'no-' if new[name] is False else ''}{name.replace('_', '-')}"
            raise BadInput(
                f"{flag} cannot change in a resumed run ({old[name]} before): {why}; leave it out, or start a run anew."
            )
    was, wanted = before.env.background, now.env.background
    if was != wanted and (None in (was, wanted) or NOISE in (was, wanted)):
        raise BadInput(
            f"--background cannot become {wanted} in a resumed run ({was} before): what was learned so far is of the "
            "other frames; leave it out, or start a run anew."
        )


RECORD_FORMAT = 2
"""Of the record that a run keeps of its options; goes up when an option is added."""
ADDED: dict[str, int] = dict.fromkeys(("threads", "env_args", "on_nan", "eval_steps", "imagined_cont"), 1)
ADDED |= {each.name: 2 for each in fields(AuxConfig)}
"""Options that records of an older format than this lack; their runs go on with the option's own default."""


def load_config(run: Path) -> Config:
    """What a run folder's config.yaml records. Raises BadInput where there is none, or where it is not whole."""
    path = run / "config.yaml"
    config = _rebuilt(Config, read_record(run)["config"])
    try:
        check(config)
    except BadInput as error:
        raise BadInput(f"{path} holds what cannot be: {error}") from None
    return config


def read_record(run: Path) -> dict[str, Any]:
    """A run folder's config.yaml: `config` with every option, `resumed`, and what the run was started with.

    Raises BadInput where there is none, where it cannot be read, or where an option is missing or no value of its kind.
    """
    import yaml

    path = run / "config.yaml"
    try:
        record = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"There is no run at {run}: {path} is missing; name a folder under --logdir.") from None
    # A damaged file's tags make PyYAML raise what it likes: ValueError, KeyError, AttributeError, RecursionError.
    except Exception as error:
        raise _unreadable(path, str(error) or type(error).__name__) from None
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise _unreadable(path, "it holds no options under `config`")
    record.setdefault("resumed", [])
    written = record.setdefault("format", 0)
    if type(written) is not int or not isinstance(record["resumed"], list):
        raise _unreadable(path, "`format` is no number or `resumed` no list")
    if written > RECORD_FORMAT:
        raise BadInput(
            f"{path} has format {written} and this version reads {RECORD_FORMAT}: use the version that wrote it."
        )
    faults = list(_faults(Config, record["config"], written))
    if faults:
        more = f", and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise _unreadable(path, "; ".join(faults[:4]) + more)
    return record


def _unreadable(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{path} cannot be read as a run's configuration ({' '.join(why.split())}): write it as it was, or start a run "
        "anew."
    )


def _faults(kind: type[Any], values: dict[Any, Any], written: int, place: str = "") -> Iterator[str]:
    """What a nested record of a format lacks of a configuration, or has besides or of another type."""
    types = {each.name: each.type for each in fields(kind)}
    for name, of in types.items():
        if name not in values and isinstance(of, type) and is_dataclass(of):
            yield from _faults(of, {}, written, f"{place}{name}.")
        elif name not in values:
            if ADDED.get(name, 0) <= written:
                yield f"it lacks {place}{name}"
        elif not _fits(values[name], of):
            yield f"{place}{name} is {reprlib.repr(values[name])}"
        elif isinstance(of, type) and is_dataclass(of):
            yield from _faults(of, values[name], written, f"{place}{name}.")
    yield from (f"{place}{reprlib.repr(name)} is no option of this version" for name in values if name not in types)


def _rebuilt(kind: type[Any], values: dict[str, Any]) -> Any:
    """The nested configuration of a whole record."""
    nested = {each.name: each.type for each in fields(kind) if isinstance(each.type, type) and is_dataclass(each.type)}
    return kind(**{name: _rebuilt(nested[name], v) if name in nested else v for name, v in values.items()})


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from a file is of a field's type: a class, a Literal, or `str | None`."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if is_dataclass(kind):
        return isinstance(value, dict)
    if kind is float:
        return type(value) in (int, float)
    return type(value) in (get_args(kind) or (kind,))
