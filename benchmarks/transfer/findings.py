"""From cells to what a reader wants: means and intervals over seeds, one table and one picture a study.

An interval is Student's t over seeds of fine-tuning, 95%: of the mean, for this base model and these test rows.
"""

import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from cells import GROUPS, Cell, Setting
from scipy import stats
from studies import Study

from mlalign.scoring import language_groups

_COLOURS = {"supervised": "#bbbbbb", "aligned": "#0b4f9e", "unseen": "#d08a00"}
_MARKERS = {"supervised": "o", "aligned": "s", "unseen": "^"}
_STYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
_HATCHES = {"supervised": "//", "aligned": "", "unseen": ".."}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval: t(0.975, n - 1) s / sqrt(n); NaN for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def by_language(measured: dict) -> dict[str, np.ndarray]:
    """Language -> accuracy by layer, [layers + 1]: mean of both directions, from and to English."""
    languages, accuracy = measured["languages"], np.array(measured["directions"], dtype=float)
    english = languages.index("en")
    return {
        name: (accuracy[:, place, english] + accuracy[:, english, place]) / 2
        for place, name in enumerate(languages)
        if name != "en"
    }


def retrieval(measured: dict, setting: Setting) -> dict[str, list[float]]:
    """Group -> accuracy by layer, mean over its languages and both directions, from and to English."""
    accuracy = by_language(measured)
    groups = language_groups(list(accuracy), list(setting.supervised), list(setting.aligned))
    return {name: np.mean([accuracy[each] for each in groups[name]], 0).tolist() for name in GROUPS if name in groups}


def collect(study: Study, seeds: list[int], setting: Setting) -> dict[str, dict]:
    """Arm -> what its cells say, one value a seed: scores by group and language, retrieval where it was measured."""
    found = {}
    for arm in study.arms:
        cells = [cell for seed in seeds if (cell := Cell(arm, seed).result(setting))]
        if cells:
            groups = [name for name in GROUPS if name in cells[0]["groups"]]
            found[arm.name] = {
                "x": arm.x,
                "seeds": [cell["seed"] for cell in cells],
                "groups": {name: [cell["groups"][name] for cell in cells] for name in groups},
                "languages": {name: [cell["scores"][name] for cell in cells] for name in cells[0]["scores"]},
                "seconds": [cell["seconds"] for cell in cells],
                "gradients": pooled_gradients([cell.get("gradients", {}) for cell in cells]),
                **_retrieval_of(cells, setting),
            }
    return found


def pooled_gradients(cells: list[dict[str, list[float]]]) -> dict[str, list]:
    """`layers`, and for each of them `cosine` and `norm_ratio`: lowest, mean and highest over log steps and seeds.

    The mean of ratios is the geometric one. Nothing of runs with one objective.
    """
    layers = sorted({name.rpartition("_")[2] for cell in cells for name in cell})
    found: dict[str, list] = {"layers": [int(layer) for layer in layers]}
    for kind, mean in (("cosine", np.mean), ("norm_ratio", stats.gmean)):
        by_layer = [[value for cell in cells for value in cell.get(f"{kind}_layer_{layer}", [])] for layer in layers]
        found[kind] = [[min(values), float(mean(values)), max(values)] for values in by_layer]
    return found


def _retrieval_of(cells: list[dict], setting: Setting) -> dict[str, dict]:
    """At the layer of alignment by group and language, one value a seed; at every layer, the mean over seeds."""
    measured = [cell["retrieval"] for cell in cells if "retrieval" in cell]
    by_layer, accuracy = [retrieval(each, setting) for each in measured], [by_language(each) for each in measured]
    groups, languages = (list(each[0]) if each else [] for each in (by_layer, accuracy))
    layer = setting.layer
    return {
        "retrieval": {name: [each[name][layer] for each in by_layer] for name in groups},
        "language_retrieval": {name: [float(each[name][layer]) for each in accuracy] for name in languages},
        "by_layer": {name: np.mean([each[name] for each in by_layer], axis=0).tolist() for name in groups},
    }


def write(study: Study, found: dict[str, dict], measured: dict, setting: Setting, folder: Path) -> None:
    """<study>.md, .json and .png into `folder`, of a study with at least one arm done.

    Args: measured: retrieval of the base model, as `cells.probe` returns it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layer, base = setting.layer, retrieval(measured, setting)
    if not any(arm["retrieval"] for arm in found.values()):
        base = {}
    content = {"study": study.name, "metric": study.metric, "layer": layer, "base_retrieval": base, "arms": found}
    text = table(study, found, base, layer)
    if study.name == "main":
        text += correlations(found, {name: values[layer] for name, values in by_language(measured).items()})
        _by_layer(found, base, layer, folder / "retrieval.png")
    (folder / f"{study.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"{study.name}.md").write_text(text)
    with_both = {name: arm["gradients"] for name, arm in found.items() if arm["gradients"]["layers"]}
    if with_both:
        _draw_gradients(study, with_both, folder / f"{study.name}_gradients.png")
    (_curve if study.axis else _bars)(study, found, folder / f"{study.name}.png")


def correlations(found: dict[str, dict], base: dict[str, float]) -> str:
    """Pearson's r over languages, F1 against the base model's retrieval accuracy and against the trained one's."""
    names = [name for name in base if all(name in arm["languages"] for arm in found.values())]
    rows = []
    for arm, values in found.items():
        f1 = [np.mean(values["languages"][name]) for name in names]
        after = [np.mean(values["language_retrieval"][name]) for name in names]
        rows.append([arm, *(f"{stats.pearsonr(x, f1).statistic:.2f}" for x in ([base[name] for name in names], after))])
    head = ["r of F1 with retrieval", "of the base model", "of the trained model"]
    return "\n".join([f"\nOver the {len(names)} languages that are not English:\n", *_markdown(head, rows), ""])


def table(study: Study, found: dict[str, dict], base: dict[str, list[float]], layer: int) -> str:
    """Two Markdown tables: groups with intervals, and languages."""
    label, groups = study.metric, _groups(found)
    others = [name for name in groups if name in base]
    head = ["", "seeds", *(f"{label} {name}" for name in groups), *(f"retrieval {name}" for name in others), "seconds"]
    before = ["base model", "", *[""] * len(groups), *(f"{base[name][layer]:.2f}" for name in others), ""]
    rows = [before] if others else []
    for name, arm in found.items():
        scores = [_cell(arm["groups"][group]) for group in groups]
        accuracy = [_cell(arm["retrieval"][group]) for group in others]
        rows.append([name, str(len(arm["seeds"])), *scores, *accuracy, f"{np.mean(arm['seconds']):.0f}"])
    languages = list(next(iter(found.values()))["languages"])
    scores = [[name, *(f"{np.mean(arm['languages'][each]):.3f}" for each in languages)] for name, arm in found.items()]
    return "\n".join(
        [
            f"# {study.title}",
            "",
            *_markdown(head, rows),
            "",
            "Means over seeds, with 95% intervals (Student's t). "
            + (f"Retrieval: accuracy at layer {layer}, to and from English. " if base else "")
            + "Seconds: of training, beside as many other cells as --jobs says.",
            "",
            *_markdown([label, *languages], scores),
            "",
        ]
    )


def _groups(found: dict[str, dict]) -> list[str]:
    return [name for name in GROUPS if any(name in arm["groups"] for arm in found.values())]


def _cell(values: list[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _bars(study: Study, found: dict[str, dict], path: Path) -> None:
    """Scores of each arm by group, a point a seed."""
    groups = _groups(found)
    figure, axis = plt.subplots(figsize=(max(6, 1.7 * len(found) + 1), 4), layout="constrained")
    width = 0.8 / len(groups)
    for number, group in enumerate(groups):
        places = np.arange(len(found)) + (number - (len(groups) - 1) / 2) * width
        values = [arm["groups"][group] for arm in found.values()]
        means, halves = zip(*(interval(each) for each in values))
        bars = axis.bar(
            places, means, width, label=group, color=_COLOURS[group], hatch=_HATCHES[group], edgecolor="white"
        )
        axis.bar_label(
            bars,
            fmt="%.2f",
            fontsize=8,
            label_type="center",
            bbox={"facecolor": "white", "alpha": 0.8, "pad": 1, "lw": 0},
        )
        axis.errorbar(places, means, np.nan_to_num(halves), fmt="none", ecolor="black", capsize=3, linewidth=1)
        for place, each in zip(places, values):
            axis.plot([place] * len(each), each, "k.", markersize=3)
    seeds = [len(arm["seeds"]) for arm in found.values()]
    axis.set_xticks(range(len(found)), [f"{name}\n{n} seed{'s' * (n > 1)}" for name, n in zip(found, seeds)])
    axis.set(ylabel=study.metric, ylim=(0, 1.15 * axis.get_ylim()[1]), title=study.title)
    axis.legend(frameon=False, ncols=len(groups), loc="upper right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curve(study: Study, found: dict[str, dict], path: Path) -> None:
    """Scores and retrieval accuracy against what the arms vary, with intervals."""
    arms = list(found.values())
    places = range(len(arms))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharex=True)
    for axis, measure, label in zip(
        axes, ("groups", "retrieval"), (study.metric, "retrieval accuracy, to and from English")
    ):
        for group in GROUPS:
            if group not in arms[0][measure]:
                continue
            means, halves = zip(*(interval(arm[measure][group]) for arm in arms))
            axis.errorbar(
                places, means, np.nan_to_num(halves), color=_COLOURS[group] if group != "supervised" else "#777777",
                marker=_MARKERS[group], capsize=3, label=group,
            )  # fmt: skip
        axis.set(xlabel=study.axis, ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.set_xticks(places, [arm["x"] for arm in arms])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, title=study.title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_gradients(study: Study, found: dict[str, dict], path: Path) -> None:
    """Cosine and norm ratio of the two objectives' gradients at every layer that alignment reaches: means, ranges."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharex=True)
    for axis, kind, label in zip(axes, ("cosine", "norm_ratio"), ("cosine", "norm of alignment / norm of task")):
        for number, (name, each) in enumerate(found.items()):
            lowest, mean, highest = np.array(each[kind]).T
            style = _style(number, len(found))
            axis.plot(each["layers"], mean, **style, label=name)
            axis.fill_between(each["layers"], lowest, highest, color=style["color"], alpha=0.15, linewidth=0)
        axis.set(xlabel="layer (0 = embeddings)", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].axhline(0, color="black", linewidth=0.8)
    axes[1].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    columns = min(4, len(labels))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, title=study.title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _style(number: int, of: int) -> dict:
    """Of a line among many: told apart in grey too."""
    colour = plt.get_cmap("cividis")(number / max(1, of - 1) * 0.85)
    return {"color": colour, "linestyle": _STYLES[number % len(_STYLES)], "marker": "s", "markersize": 3}


def _by_layer(found: dict[str, dict], base: dict[str, list[float]], layer: int, path: Path) -> None:
    """Retrieval accuracy at every layer, before and after, a panel a group."""
    figure, axes = plt.subplots(
        1, len(base), figsize=(4.4 * len(base), 3.8), layout="constrained", sharey=True, squeeze=False
    )
    for axis, group in zip(axes.flat, base):
        axis.plot(base[group], color="#777777", marker="o", markersize=3, label="base model")
        for number, (name, arm) in enumerate(found.items()):
            axis.plot(arm["by_layer"][group], **_style(number, len(found)), label=name)
        axis.axvline(layer, color="black", linewidth=0.8, linestyle=(0, (1, 2)))
        axis.set(title=f"{group} languages", xlabel="layer (decoder blocks run)", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes.flat[0].set_ylabel("retrieval accuracy, to and from English")
    axes.flat[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
