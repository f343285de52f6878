"""The past actions from which a resumed run brings environments back to where they were.

EnvPool cannot save its state, nor can most Gymnasium environments; but all are deterministic given seed and actions.
"""

import numpy as np

from fastdreamer.envs.base import Spaces
from fastdreamer.envs.protocol import Replay, compact

LIMIT = 256 * 2**20
"""Bytes of actions kept for one worker. 256 MiB hold 268 million steps of a discrete environment, 11 million of six
float32 action dimensions."""


class Journal:
    """Actions of one worker's n environments since they were made, or (`episodic`) in their current episodes.

    Beyond `limit` bytes the actions are forgotten. Environments are then not `restorable`: for good, or (`episodic`)
    until each has started another episode.
    """

    def __init__(self, count: int, spaces: Spaces, episodic: bool, limit: int = LIMIT) -> None:
        self._spaces, self._episodic, self._limit = spaces, episodic, limit
        self._actions = compact(np.zeros((64, count, spaces.action), np.float32), spaces)
        self._length = 0
        self._start = np.zeros(count, np.int64)
        self._episode = np.zeros(count, np.int64)

    @property
    def restorable(self) -> bool:
        return bool((self._start >= 0).all())

    def append(self, action: np.ndarray, is_first: np.ndarray) -> None:
        """Notes float32 (n, A) actions and whether the rows they led to start an episode, bool (n,)."""
        if self._length == len(self._actions):
            self._make_room()
        self._actions[self._length] = compact(action, self._spaces)
        self._length += 1
        if self._episodic:
            self._start[is_first] = self._length
            self._episode[is_first] += 1

    def replay(self) -> Replay:
        """What a new worker with the same seed must do; copies."""
        first = int(self._start.min())
        return Replay(self._episode.copy(), self._start - first, self._actions[first : self._length].copy())

    def load(self, replay: Replay) -> None:
        """Goes on after `replay`."""
        self._actions, self._length = replay.actions, len(replay.actions)
        self._start, self._episode = replay.start.copy(), replay.episode.copy()

    def _make_room(self) -> None:
        first = max(0, int(self._start.min()))
        kept = self._actions[first : self._length]
        if 2 * len(kept) > len(self._actions) and self._actions.nbytes * 2 > self._limit:
            kept, first = kept[:0], self._length
        grown = np.zeros((max(64, 2 * len(kept)), *self._actions.shape[1:]), self._actions.dtype)
        grown[: len(kept)] = kept
        self._actions, self._length = grown, len(kept)
        # A start before the first action kept is gone: it stays negative.
        self._start = np.maximum(self._start - first, -1)
