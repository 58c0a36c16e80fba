"""Pictures: readable in greyscale, one idea each."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on a compute node
import matplotlib.pyplot as plt

_STYLES = [("#888888", "--", "o"), ("#0b4f9e", "-", "s")]


def plot_layers(curves: dict[str, list[float]], path: Path, marked: int | None = None) -> None:
    """Retrieval accuracy by layer, one curve per name (values of layers 0, 1, ...); `marked`: the aligned layer."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, values), (colour, line, marker) in zip(curves.items(), _STYLES):
        axes.plot(range(len(values)), values, line, color=colour, marker=marker, label=name)
    if marked is not None:
        axes.axvline(marked, color="black", linewidth=0.8, linestyle=":")
        axes.annotate("aligned layer", (marked, 0.08), rotation=90, ha="right", va="bottom", fontsize=8)
    axes.set(xlabel="layer (decoder blocks run)", ylabel="retrieval accuracy", ylim=(0, 1.02))
    axes.set_xticks(range(max(map(len, curves.values()))))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_languages(bars: dict[str, dict[str, float]], path: Path, metric: str) -> None:
    """Grouped bars per language, one group member per name: `{name: {language: value}}`."""
    languages = list(next(iter(bars.values())))
    width = 0.8 / len(bars)
    figure, axes = plt.subplots(figsize=(max(6.0, 0.9 * len(languages)), 4), layout="constrained")
    for number, (name, values) in enumerate(bars.items()):
        places = [i + (number - (len(bars) - 1) / 2) * width for i in range(len(languages))]
        heights = [values[language] for language in languages]
        colour, hatch = (("#bbbbbb", "//"), ("#0b4f9e", ""))[number % 2]
        drawn = axes.bar(places, heights, width, label=name, color=colour, hatch=hatch, edgecolor="white")
        axes.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
    axes.set(ylabel=metric, ylim=(0, 1.12))
    axes.set_xticks(range(len(languages)), languages)
    axes.legend(frameon=False, loc="upper center", ncols=len(bars), bbox_to_anchor=(0.5, 1.12))
    figure.savefig(path, dpi=150)
    plt.close(figure)
