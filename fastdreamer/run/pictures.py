"""The pictures of a run: its learning curve, and animations of what it sees and dreams."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdreamer.config import BadInput
from fastdreamer.run.records import Run, Series, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800", "#000000",
)  # fmt: skip
COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, YELLOW, BLACK)
GREY = "#777777"

DREAM_FRAME_TIME = 100  # milliseconds
DREAM_PAUSE = 1000
# What the panel of losses leaves out: the sum of the others, and the two KL losses, which are `kl` above a floor.
SKIPPED_LOSSES = ("model", "dyn", "rep")
FRAME_TIME = 50  # milliseconds of an animation's frame


def learning_curve(run: Run) -> Path:
    """Draws `learning_curve.png` in the run's folder and returns its path.

    Above: returns of training episodes (dots), their running mean, and evaluations with the standard deviation over
    their episodes. Below: the losses that are positive throughout, smoothed, on a logarithmic scale.
    Raises BadInput where the picture cannot be written.
    """
    from matplotlib.figure import Figure

    config = run.config
    losses = {
        name: series
        for name, loss in sorted(run.losses.items())
        if name not in SKIPPED_LOSSES
        and len((series := loss.smooth(max(1, len(loss.values) // 100))).values) > 1
        and bool((series.values > 0).all())
    }
    figure = Figure(figsize=(8, 5.4 if losses else 3.8), layout="constrained")
    grid = figure.add_gridspec(2 if losses else 1, 1, height_ratios=(2.2, 1) if losses else (1,))
    upper = figure.add_subplot(grid[0])
    clean(upper, "episode return")
    name = config.task.partition("/")[2]
    upper.set_title(f"{name}, {run.method}, seed {config.seed}", loc="left", fontsize=11, fontweight="bold", wrap=True)
    episodes = run.episodes
    if len(episodes.values):
        upper.plot(*xy(episodes), ".", color=SKY, alpha=0.35, markersize=3.5, markeredgewidth=0, label="episode")
        upper.plot(*xy(episodes.curve()), color=BLUE, linewidth=2, label=f"mean of {episodes.window} episodes")
    if len(run.evaluation.values):
        upper.errorbar(
            *xy(run.evaluation), yerr=np.nan_to_num(run.evaluation_std), fmt="o", color=RED, markersize=5, capsize=3,
            linewidth=1.2, zorder=3, label="evaluation, mean ± std of its episodes",
        )  # fmt: skip
    if upper.get_legend_handles_labels()[0]:
        _legend_above(upper)
    else:
        upper.text(0.5, 0.5, "no episode has ended yet", transform=upper.transAxes, ha="center", color=GREY)
    upper.set_xlim(0, max(run.frames, 1) * 1.02)
    if losses:
        lower = figure.add_subplot(grid[1], sharex=upper)
        clean(lower, "loss")
        lower.set_yscale("log")
        for index, (name, loss) in enumerate(losses.items()):
            dashes = "-" if index < len(COLOURS) else "--"
            lower.plot(*xy(loss), color=COLOURS[index % len(COLOURS)], linestyle=dashes, linewidth=1.2, label=name)
        lower.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, labelspacing=0.25)
        upper.tick_params(labelbottom=False)
    label_frames(figure.axes[-1])
    return save(figure, run.path / "learning_curve.png", f"free space or give yourself rights on {run.path}")


def xy(series: Series) -> tuple[np.ndarray, np.ndarray]:
    return series.frames, series.values


def clean(axes: "Axes", ylabel: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylabel(ylabel)
    axes.tick_params(labelsize=9)


def _legend_above(axes: "Axes") -> None:
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=3, frameon=False, fontsize=9, markerscale=1.5,
        borderpad=0.2, handletextpad=0.5, columnspacing=1.5,
    )  # fmt: skip
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    axes.set_title(axes.get_title(loc="left"), loc="left", fontsize=11, fontweight="bold", pad=24)


def label_frames(axes: "Axes") -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel("environment frames")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def save(figure: "Figure", path: Path, mend: str) -> Path:
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format=path.suffix[1:] or None, dpi=150)
        write_whole(path, drawn.getvalue())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be written ({error}): {mend}.") from None
    return path


def dream_gif(true: np.ndarray, imagined: np.ndarray, path: Path, *, context: int, scale: int = 3) -> Path:
    """Writes an animation of what the model sees and dreams, and returns its path.

    `true`, `imagined`: uint8 (R, T, H, W, 3): R sequences, one below the other. Columns: true, imagined, and their
    absolute difference. Of the T steps the first `context` are reconstructions from the posterior, which has seen the
    frame; in the others the model imagines from actions alone. Borders and the legend tell them apart. `scale`
    enlarges pixels. Raises ValueError for arrays of another kind, BadInput where `path` cannot be written.
    """
    if true.shape != imagined.shape or true.ndim != 5 or true.dtype != np.uint8 or imagined.dtype != np.uint8:
        raise ValueError(
            f"expected two uint8 (R, T, H, W, 3), got {true.dtype} {true.shape} and {imagined.dtype} {imagined.shape}"
        )
    error = np.abs(true.astype(np.int16) - imagined).astype(np.uint8)
    frames = [
        _dream_frame(np.stack([true[:, t], imagined[:, t], error[:, t]], 1), t, true.shape[1], context, scale)
        for t in range(true.shape[1])
    ]
    return _write(path, encode_gif(np.stack(frames), frame_time=DREAM_FRAME_TIME, pause=DREAM_PAUSE))


def gif(frames: np.ndarray, path: Path, *, scale: int = 4) -> Path:
    """Writes uint8 (T, H, W, 3) as an animation, each pixel `scale` wide and high, and returns its path.

    Raises BadInput where it cannot be written.
    """
    return _write(path, encode_gif(frames, scale=scale))


def _write(path: Path, data: bytes) -> Path:
    try:
        write_whole(path, data)
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}): make space or the folder writable.") from None
    return path


def _dream_frame(cells: np.ndarray, step: int, steps: int, context: int, scale: int) -> np.ndarray:
    """One step of a dream as a picture, from uint8 (R, 3, H, W, 3): rows by columns."""
    from PIL import Image, ImageDraw

    rows, columns, height, width, _ = cells.shape
    border, gap = 3, 5
    pitch_x, pitch_y = width * scale + 2 * border + gap, height * scale + 2 * border + gap
    total = gap + columns * pitch_x
    states = ((BLUE, "context: has seen the frame"), (ORANGE, "open loop: actions alone"))
    count = f"step {step + 1} / {steps}"
    font = _font(total - 2 * gap, "   ".join([*(f"  {text}" for _, text in states), f"step {steps} / {steps}"]))
    line = int(font.size * 1.6)
    canvas = Image.new("RGB", (total, line + rows * pitch_y + line), "white")
    draw = ImageDraw.Draw(canvas)
    colour = states[step >= context][0]
    for column, title in enumerate(("true", "imagined", "error")):
        x = gap + column * pitch_x
        draw.text((x + (pitch_x - gap) / 2, line / 2), title, fill="black", font=font, anchor="mm")
        for row in range(rows):
            y = line + row * pitch_y
            frame = colour if title == "imagined" else "#DDDDDD"
            draw.rectangle((x, y, x + pitch_x - gap - 1, y + pitch_y - gap - 1), outline=frame, width=border)
            picture = Image.fromarray(cells[row, column]).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            canvas.paste(picture, (x + border, y + border))
    x, middle = float(gap), line + rows * pitch_y + line / 2 - gap / 2
    box = font.size * 0.7
    for index, (swatch, text) in enumerate(states):
        active = index == (step >= context)
        draw.rectangle((x, middle - box / 2, x + box, middle + box / 2), fill=swatch)
        x += box + font.size * 0.4
        draw.text((x, middle), text, fill="black" if active else "#999999", font=font, anchor="lm")
        x += draw.textlength(text, font=font) + font.size
    draw.text((total - gap, middle), count, fill="black", font=font, anchor="rm")
    return np.asarray(canvas)


def _font(width: float, text: str) -> Any:
    """The largest built-in font, up to 15 pixels, in which `text` fits `width`."""
    from PIL import ImageFont

    for size in range(15, 6, -1):
        font: Any = ImageFont.load_default(size)
        if font.getlength(text) <= width:
            return font
    return ImageFont.load_default(6)


def encode_gif(frames: np.ndarray, *, frame_time: int = FRAME_TIME, pause: int = 0, scale: int = 1) -> bytes:
    """uint8 (T, H, W, 3) as an animated GIF that repeats: `frame_time` ms a frame, the last one `pause` ms longer, each
    pixel `scale` wide and high."""
    from PIL import Image

    # The usual median cut gives rare colours (a border, a swatch) away to shades of the frequent ones.
    method = Image.Quantize.MAXCOVERAGE
    size = (frames.shape[2] * scale, frames.shape[1] * scale)
    first, *others = [
        Image.fromarray(frame).quantize(method=method).resize(size, Image.Resampling.NEAREST) for frame in frames
    ]
    times = [frame_time] * len(others) + [frame_time + pause]
    encoded = io.BytesIO()
    first.save(encoded, "GIF", save_all=True, append_images=others, duration=times, loop=0)
    return encoded.getvalue()
