"""Pictures: readable in greyscale, one idea each, languages by their codes."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on a compute node
import matplotlib.pyplot as plt
import numpy as np

_COLOURS = ["#777777", "#0b4f9e", "#d08a00", "#5b2a86"]  # of series; their lightness differs
_MARKERS = ["o", "s", "^", "D"]
_LINES = ["-", ":", "--", "-."]  # of groups
_BARS = [("#bbbbbb", "//"), ("#0b4f9e", ""), ("#d08a00", ".."), ("#5b2a86", "xx")]  # of systems: colour, hatch
_HEAT = "cividis"  # lightness grows with the value


def plot_layers(
    panels: dict[str, dict[tuple[str, str], list[float]]], layers: list[int], chosen: int, path: Path
) -> None:
    """Small panels of values by layer, one for each measure: `{measure: {(series, group): values}}`, and a legend.

    Args: chosen: the layer that is marked.
    """
    columns = min(4, len(panels))
    height = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(3.4 * columns, 2.6 * height + 0.5), layout="constrained", squeeze=False, sharex=True
    )
    keys = list(next(iter(panels.values())))
    series, groups = list(dict.fromkeys(name for name, _ in keys)), list(dict.fromkeys(name for _, name in keys))
    for axis, (measure, curves) in zip(axes.flat, panels.items()):
        for (name, group), values in curves.items():
            number = series.index(name) + (len(series) == 1)  # one alone is drawn dark
            axis.plot(
                layers,
                values,
                _LINES[groups.index(group) % len(_LINES)],
                color=_COLOURS[number % len(_COLOURS)],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=3.5,
                label=_label(name, group, len(series), len(groups)),
            )
        axis.axvline(chosen, color="black", linewidth=0.8, linestyle=(0, (1, 2)))
        axis.set_title(measure, fontsize=10)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel(f"layer (decoder blocks run); dotted: layer {chosen}", fontsize=9)
    if len(keys) > 1:
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(keys)), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_heat(
    panels: dict[str, np.ndarray], rows: list[str], columns: list[str], labels: tuple[str, str, str], path: Path
) -> None:
    """Heat maps side by side on one scale: `{title: [rows, columns]}`; NaN stays white.

    Args: labels: of rows, columns and the scale.
    """
    width = max(3.0, 0.2 * len(columns) + 1)
    height = max(3.0, 0.17 * len(rows) + 1.2)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(width * len(panels) + 1, height), layout="constrained", squeeze=False
    )
    finite = np.concatenate([values[np.isfinite(values)] for values in panels.values()])
    low, high = (min(0.0, finite.min()), finite.max()) if finite.size else (0.0, 1.0)
    for axis, (title, values) in zip(axes.flat, panels.items()):
        image = axis.imshow(values, cmap=_HEAT, vmin=low, vmax=max(high, low + 1e-6), aspect="auto")
        axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        axis.set(title=title, xlabel=labels[1])
    axes.flat[0].set_ylabel(labels[0])
    figure.colorbar(image, ax=axes, label=labels[2], shrink=0.9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_scatter(panels: dict[str, dict[str, tuple[float, float]]], labels: tuple[str, str], path: Path) -> None:
    """Named points side by side: `{title: {name: (x, y)}}`, with a fitted line. Args: labels: of x and y."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (title, points) in zip(axes.flat, panels.items()):
        x, y = np.array(list(points.values())).T
        axis.scatter(x, y, s=14, color=_COLOURS[1])
        for name, place in points.items():
            axis.annotate(name, place, fontsize=7, xytext=(2, 3), textcoords="offset points")
        if np.ptp(x) > 0:
            slope, start = np.polyfit(x, y, 1)
            ends = np.array([x.min(), x.max()])
            axis.plot(ends, start + slope * ends, color=_COLOURS[0], linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel=labels[0])
        axis.grid(alpha=0.3)
    axes.flat[0].set_ylabel(labels[1])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_scores(bars: dict[str, dict[str, float]], path: Path, metric: str) -> None:
    """Grouped bars per language, one group member per name: `{name: {language: value}}`."""
    languages = list(next(iter(bars.values())))
    width = 0.8 / len(bars)
    inches = min(24.0, max(6.0, 0.45 * len(bars) * len(languages)))
    figure, axes = plt.subplots(figsize=(inches, 4), layout="constrained")
    for number, (name, values) in enumerate(bars.items()):
        places = [i + (number - (len(bars) - 1) / 2) * width for i in range(len(languages))]
        heights = [values[language] for language in languages]
        colour, hatch = _BARS[number % len(_BARS)]
        drawn = axes.bar(places, heights, width, label=name, color=colour, hatch=hatch, edgecolor="white")
        if inches / (len(bars) * len(languages)) > 0.3:  # else the numbers would run into each other
            axes.bar_label(drawn, fmt="%.2f" if max(heights) <= 1 else "%.1f", fontsize=7, padding=2)
    top = max(1.0, *(value for values in bars.values() for value in values.values()))
    axes.set(ylabel=metric, ylim=(0, 1.12 * top), xlim=(-0.6, len(languages) - 0.4))
    axes.set_xticks(range(len(languages)), languages, rotation=90 if len(languages) > 20 else 0)
    axes.legend(frameon=False, loc="upper center", ncols=len(bars), bbox_to_anchor=(0.5, 1.12))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_curve(
    x: list[float],
    mean: list[float],
    lines: dict[str, list[float]],
    chosen: float,
    labels: tuple[str, str],
    path: Path,
) -> None:
    """A mean, bold, over thin lines that are named at their ends: `{name: values}`, each with a value for every x.

    Args: chosen: the x that is marked; labels: of x and y.
    """
    figure, axes = plt.subplots(figsize=(7, max(4.0, 0.17 * len(lines) + 1)), layout="constrained")
    for number, values in enumerate(lines.values()):
        axes.plot(x, values, _LINES[number % len(_LINES)], color=_COLOURS[0], linewidth=0.8)
    axes.plot(x, mean, color=_COLOURS[1], linewidth=2.5, marker=_MARKERS[0], markersize=4, label="mean")
    best = mean[x.index(chosen)]
    axes.axvline(chosen, color="black", linewidth=0.8, linestyle=(0, (1, 2)))
    axes.plot([chosen], [best], "*", color="black", markersize=14, label=f"chosen: {chosen:g}, mean {best:.3g}")
    low, high = axes.get_ylim()
    step = (high - low) * 0.17 / figure.get_figheight()  # the height of a name
    place = low
    for number, (end, name) in enumerate(sorted((values[-1], name) for name, values in lines.items()), 1):
        place = min(max(end, place), high - (len(lines) - number) * step)
        axes.annotate(
            name,
            (x[-1], end),
            xytext=(1.04, place),
            textcoords=axes.get_yaxis_transform(),
            fontsize=7,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 1},
        )
        place += step
    axes.set(xlabel=labels[0], ylabel=labels[1], ylim=(low, high))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _label(name: str, group: str, series: int, groups: int) -> str:
    return ", ".join([name] * (series > 1) + [group] * (groups > 1))
