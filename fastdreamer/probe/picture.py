"""The picture of a probed run: what it saw, what its decoder draws from s_t, and what a line reads off the latents."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastdreamer.algorithm.agent import Agent
from fastdreamer.probe.episodes import Episodes
from fastdreamer.probe.linear import Scores
from fastdreamer.probe.rollout import Observed
from fastdreamer.run.pictures import COLOURS, GREY, clean, save

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.figure import SubFigure

FRAMES = 8
METRICS = {"r2": "R2", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}
"""What a bar may show, and how the picture calls it."""


def metric(scores: dict[str, float]) -> str | None:
    """Which of METRICS a probe was scored by; None for one that tells nothing."""
    return next((name for name in METRICS if name in scores), None)


@torch.no_grad()
def drawn(agent: Agent, observed: Observed, episodes: Episodes, shown: int) -> list[tuple[str, np.ndarray]]:
    """By title FRAMES frames uint8 (FRAMES, 64, 64, 3) spread over episode `shown`: the true ones, and those that the
    decoder, if there is one, draws from s_t; nothing where there are no images."""
    if "image" not in episodes.rows:
        return []
    steps = np.linspace(0, episodes.lengths[shown] - 1, FRAMES).astype(int)
    found = [("true", episodes.rows["image"][episodes.padded()[shown, steps]])]
    if agent.world_model.decoder is not None:
        features = observed.states.features()[shown, torch.from_numpy(steps).to(observed.embed.device)]
        image = agent.world_model.decoder(features)["image"]
        found.append(("drawn from s_t", ((image + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()))
    return [(title, frames.transpose(0, 2, 3, 1)) for title, frames in found]


def draw(path: Path, title: str, frames: list[tuple[str, np.ndarray]], features: dict[str, Scores]) -> Path:
    """Draws frames as `drawn` gives them, above the scores of probes by feature as bars, one group a truth.

    Raises BadInput where `path` cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4 + 1.05 * len(frames)), layout="constrained")
    *rows, below = figure.subfigures(len(frames) + 1, 1, height_ratios=[1] * len(frames) + [3], squeeze=False)[:, 0]
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    _rows(rows, frames)
    axes = below.subplots()
    clean(axes, "test episodes")
    told = {
        name: kind for name in dict.fromkeys(name for scores in features.values() for name in scores)
        if (kind := next((m for scores in features.values() if (m := metric(scores.get(name, {})))), None))
    }  # fmt: skip
    width = 0.8 / max(1, len(features))
    for index, (feature, scores) in enumerate(features.items()):
        values = [scores.get(name, {}).get(kind, np.nan) for name, kind in told.items()]
        place = np.arange(len(told)) + (index - (len(features) - 1) / 2) * width
        colour = GREY if "untrained" in feature else COLOURS[index % len(COLOURS)]
        axes.bar(place, values, width * 0.9, color=colour, label=feature)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(np.arange(len(told)), [f"{name}\n{METRICS[kind]}" for name, kind in told.items()])
    axes.set_ylim(top=1)
    if told:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(features), frameon=False, fontsize=9)
    return save(figure, path, "free space or give yourself rights on the run's folder")


def draw_frames(path: Path, frames: list[tuple[str, np.ndarray]]) -> Path:
    """Draws rows of frames uint8 (FRAMES, 64, 64, 3) by title. Raises BadInput where `path` cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.25 * len(frames)), layout="constrained")
    _rows(figure.subfigures(len(frames), 1, squeeze=False)[:, 0], frames)
    return save(figure, path, "name a .png file in a folder that is there by --picture")


def _rows(figures: "Iterable[SubFigure]", frames: list[tuple[str, np.ndarray]]) -> None:
    # A title of the first frame's own would widen its column.
    for figure, (name, images) in zip(figures, frames, strict=True):
        figure.suptitle(name, x=0.01, ha="left", fontsize=9)
        for axes, image in zip(figure.subplots(1, FRAMES), images, strict=True):
            axes.imshow(image)
            axes.set_xticks([])
            axes.set_yticks([])
