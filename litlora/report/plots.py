"""The plots of a report, as PNGs: each on white, and on black for dark pages."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from litlora.markdown import clean
from litlora.report.runs import Run, labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, which the colour-blind tell apart too; those that show on white and on black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A")
DASHES = ("-", "--", ":", "-.")
MAX_POINTS = 2000  # of a line: more than there are pixels


@dataclass(frozen=True)
class Plot:
    """One picture; `name` is the PNG's, without its ending."""

    name: str
    title: str
    light: bytes
    dark: bytes


def draw(runs: Sequence[Run]) -> list[Plot] | None:
    """Loss, learning rate and weight changes, as far as the runs have them; None where matplotlib is missing."""
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    kinds: list[tuple[str, str, Callable[[Figure, Sequence[Run]], bool]]] = [
        ("loss", "Training loss (smoothed; pale behind it, every step) and validation loss, per trained token", _loss),
        ("learning_rate", "Learning rate", _learning_rate),
        ("delta", "Change of the weights, ‖ΔW‖ / ‖W‖, mean over the layers", _deltas),
    ]
    plots = []
    for name, title, fill in kinds:
        pictures = []
        for colour, ground in (("#222222", "white"), ("#dddddd", "#16181c")):
            keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
            settings: dict[str, Any] = dict.fromkeys(keys, colour)
            settings |= {"figure.facecolor": ground, "axes.facecolor": ground, "savefig.facecolor": ground}
            settings |= {"text.parse_math": False, "font.family": "DejaVu Sans", "font.size": 10}
            settings |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
            with mpl.rc_context(settings), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # letters that the font lacks
                picture = _render(fill, runs)
            if picture is not None:
                pictures.append(picture)
        if pictures:
            plots.append(Plot(name, title, *pictures))
    return plots


def _render(fill: Callable[[Figure, Sequence[Run]], bool], runs: Sequence[Run]) -> bytes | None:
    """A PNG; None where there is nothing to draw."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), dpi=120, layout="constrained")
    if not fill(figure, runs):
        return None
    if len(runs) > 1:
        _legend(figure, runs)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _style(place: int) -> dict[str, Any]:
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place // len(COLOURS) % len(DASHES)]}


def _legend(figure: Figure, runs: Sequence[Run]) -> None:
    """Under the plot, a column for each few runs. An underscore at its begin would hide a label: a space goes first."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], linewidth=2, **_style(place)) for place in range(len(runs))]
    names = [" " + clean(name, 40) for name in labels([run.path for run in runs])]
    width = max(map(len, names))
    columns = max(1, min(len(runs), 110 // (width + 6)))
    rows = -(-len(runs) // columns)
    figure.set_figheight(figure.get_figheight() + 0.24 * rows)
    figure.legend(lines, names, loc="outside lower center", ncols=columns, frameon=False)


def _loss(figure: Figure, runs: Sequence[Run]) -> bool:
    """Training on the left, validation beside it on a scale of its own."""
    validated = any(len(run.points("val_loss")[0]) for run in runs)
    grid = figure.subplots(1, 2 if validated else 1, sharex=True, squeeze=False).flatten()
    drawn = validated
    for place, run in enumerate(runs):
        style = _style(place)
        steps, losses = run.points("loss")
        if len(steps):
            drawn = True
            _line(grid[0], steps, losses, **style, alpha=0.25, linewidth=0.8)
            _line(grid[0], steps, smooth(losses), **style, linewidth=1.6, marker="." if len(steps) < 3 else "")
        steps, losses = run.points("val_loss")
        if len(steps):
            _line(grid[1], steps, losses, **style, linewidth=1.4, marker="o", markersize=3.5)
    for axes, label in zip(grid, ("training loss", "validation loss"), strict=False):
        axes.set_title(label, fontsize=10)
        _steps(axes)
    return drawn


def _learning_rate(figure: Figure, runs: Sequence[Run]) -> bool:
    axes = figure.subplots()
    drawn = False
    for place, run in enumerate(runs):
        steps, rates = run.points("lr")
        if len(steps):
            drawn = True
            _line(axes, steps, rates, **_style(place), linewidth=1.6, marker="." if len(steps) < 3 else "")
    _steps(axes)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    return drawn


def _deltas(figure: Figure, runs: Sequence[Run]) -> bool:
    """A small plot a target, on one scale."""
    keys = dict.fromkeys(key for run in runs for key in run.metrics if key.startswith("delta_"))
    targets = [key for key in keys if any(len(run.points(key)[0]) for run in runs)]
    if not targets:
        return False
    columns = min(4, len(targets))
    rows = -(-len(targets) // columns)
    if rows > 1:
        figure.set_figheight(3 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, target in zip(grid, targets, strict=False):
        for place, run in enumerate(runs):
            steps, ratios = run.points(target)
            if len(steps):
                _line(axes, steps, 100 * ratios, **_style(place), linewidth=1.4, marker="o", markersize=3)
        axes.set_title(clean(target.removeprefix("delta_"), 30), fontsize=10)
    grid[0].set_ylim(bottom=0)  # of all, and last: it ends the fitting to the data
    for place, axes in enumerate(grid):
        axes.set_visible(place < len(targets))
        if place + columns >= len(targets):
            _steps(axes)
            axes.tick_params(labelbottom=True)
    figure.supylabel("‖ΔW‖ / ‖W‖ in %", fontsize=10)
    return True


def _steps(axes: Axes) -> None:
    """The axis below: there are no half steps."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def _line(axes: Axes, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], **style: Any) -> None:
    kept = np.abs(y) < 1e30  # what matplotlib can put on an axis
    x, y = x[kept], y[kept]
    every = -(-len(x) // MAX_POINTS) or 1
    axes.plot(x[::every], y[::every], **style)


def smooth(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean of the steps around each, a 25th of all; fewer at the ends."""
    half = len(values) // 50
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    means: npt.NDArray[np.float64] = (sums[last] - sums[first]) / (last - first)
    return means
