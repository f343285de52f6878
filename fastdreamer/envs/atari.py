"""The 26 games of Atari 100k through EnvPool: `atari/<game>`, by the protocol of that benchmark."""

import os

from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs.base import nearest
from fastdreamer.envs.envpool import EnvPoolBatch

# fmt: off
GAMES = [
    "alien", "amidar", "assault", "asterix", "bank_heist", "battle_zone", "boxing", "breakout", "chopper_command",
    "crazy_climber", "demon_attack", "freeway", "frostbite", "gopher", "hero", "jamesbond", "kangaroo", "krull",
    "kung_fu_master", "ms_pacman", "pong", "private_eye", "qbert", "road_runner", "seaquest", "up_n_down",
]
# fmt: on

_EPISODE_FRAMES = 108_000


def build(game: str, config: EnvConfig, seed: int, count: int, first_index: int) -> EnvPoolBatch:
    """`count` environments of one game; environment i of the run is seeded from `seed` and i.

    RGB frames, each the maximum of the last two of `action_repeat`; up to 30 no-ops at the start, no sticky actions,
    the game's own action set, a whole game an episode (no end at a lost life), raw rewards, 108,000 frames at most
    (which is a time limit, not a terminal). Raises BadInput for another game, and for --obs other than pixels.
    """
    task = f"atari/{game}"
    if game not in GAMES:
        raise BadInput(f"--task {task} is not one of the games of Atari 100k{nearest(game, GAMES, 'atari/')}.")
    if config.obs != "pixels":
        raise BadInput(f"--obs {config.obs} needs a vector and --task {task} has none; use --obs pixels.")
    return EnvPoolBatch(
        "".join(word.capitalize() for word in game.split("_")) + "-v5",
        task,
        obs="pixels",
        repeat=1,
        seed=seed,
        count=count,
        first_index=first_index,
        threads=min(count, len(os.sched_getaffinity(0))),
        stack_num=1,
        gray_scale=False,
        img_height=64,
        img_width=64,
        frame_skip=config.action_repeat,
        noop_max=30,
        use_fire_reset=False,
        episodic_life=False,
        reward_clip=False,
        repeat_action_probability=0.0,
        full_action_space=False,
        max_episode_steps=_EPISODE_FRAMES // config.action_repeat,
    )
