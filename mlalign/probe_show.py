"""What a probe shows: pictures, TensorBoard, the console's table. `result` is what `mlalign probe` writes as JSON."""

import math
import shutil
from pathlib import Path

from rich import box
from rich.table import Table

from mlalign import plots
from mlalign.probe_report import DECISIVE, EVERY, MEASURES, Curves
from mlalign.tracker import console, say

_SHOWN_GROUP = "low-resource"  #: the group that layers.png draws beside the mean


def draw(
    result: dict, curves: dict[str, Curves], reports: dict[str, tuple[str, dict[str, float]]], output: Path
) -> None:
    """layers.png, languages.png, directions.png, and transfer.png where there are reports: name -> (metric, scores)."""
    layers, chosen = result["layers"], result["recommendation"]["layer"]
    groups = {EVERY: None} | {name: each for name, each in result["groups"].items() if name == _SHOWN_GROUP}
    panels = {
        measure.replace("_", " "): {
            (name, group): each.mean(measure, members).tolist()
            for name, each in curves.items()
            for group, members in groups.items()
        }
        for measure in MEASURES
    }
    plots.plot_layers(panels, layers, chosen, output / "layers.png")
    accuracy = {name: each.by_language(DECISIVE).T for name, each in curves.items()}
    scale = "margin-ratio accuracy"
    plots.plot_heat(
        accuracy, result["languages"], [str(k) for k in layers], ("", "layer", scale), output / "languages.png"
    )
    at = layers.index(chosen)
    directions = {f"{name}, layer {chosen}": each.directions[DECISIVE][at] for name, each in curves.items()}
    labels = ("from", "to", scale)
    plots.plot_heat(directions, result["languages"], result["languages"], labels, output / "directions.png")
    (output / "transfer.png").unlink(missing_ok=True)
    points = {}
    for report, (_, scores) in reports.items():
        found = result["correlation"][report]
        for name, each in curves.items():
            title = f"{report}\n{name}: {_correlation(found[name], at)}"
            points[title] = {
                ours: (each.by_language(DECISIVE)[at, result["languages"].index(ours)], scores[theirs])
                for ours, theirs in found["languages"]
            }
    if reports:
        metric = next(iter(reports.values()))[0]
        plots.plot_scatter(points, (f"{scale} at layer {chosen}", metric), output / "transfer.png")


def log(result: dict, curves: dict[str, Curves], output: Path) -> None:
    """TensorBoard: a run per model, the layer as its step; the pictures beside them."""
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    folder = output / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    groups = {name: None if name == EVERY else members for name, members in result["groups"].items()}
    for name, each in curves.items():
        with SummaryWriter(str(folder / name.replace(", ", "-"))) as writer:
            for group, members in groups.items():
                for measure in MEASURES:
                    for layer, value in zip(result["layers"], each.mean(measure, members)):
                        if math.isfinite(value):
                            writer.add_scalar(f"{group}/{measure}", value, layer)
    with SummaryWriter(str(folder)) as writer:
        for name in ("layers", "languages", "directions", "transfer"):
            if (output / f"{name}.png").exists():
                writer.add_image(name, imread(output / f"{name}.png")[..., :3], 0, dataformats="HWC")
        writer.add_text("recommendation", _sentence(result), 0)


def show(result: dict, curves: dict[str, Curves], output: Path) -> None:
    """The console's table, and what follows from it."""
    shown = ("margin_ratio", "mexa", "separability")
    if len(curves) == 1:
        shown = ("cosine", "margin_ratio", "mexa", "cka", "anisotropy", "separability")
    table = Table("layer", *(measure.replace("_", " ") for measure in shown), box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].justify = "right"
    means = {name: {measure: each.mean(measure) for measure in shown} for name, each in curves.items()}
    for i, layer in enumerate(result["layers"]):
        cells = [" / ".join(f"{means[name][measure][i]:.3f}" for name in means) for measure in shown]
        mark = "* " if layer == result["recommendation"]["layer"] else ""
        table.add_row(f"{mark}{layer}", *cells)
    if len(curves) > 1:
        table.title = " / ".join(curves)
    console.print(table)
    at = result["layers"].index(result["recommendation"]["layer"])
    for report, found in result["correlation"].items():
        for name in curves:
            say(
                f"{report}: {found['metric']} of {len(found['languages'])} languages and accuracy of {name} at layer "
                f"{result['recommendation']['layer']}: {_correlation(found[name], at)}"
            )
    say(_sentence(result))
    say(f"pictures and numbers in {output}; use it with: alignment.layer=probe:{output}")


def _correlation(found: dict[str, list[float]], at: int) -> str:
    return (
        f"Pearson {found['pearson'][at]:.2f} (p {found['pearson_p'][at]:.2g}), "
        f"Spearman {found['spearman'][at]:.2f} (p {found['spearman_p'][at]:.2g})"
    )


def _sentence(result: dict) -> str:
    found = result["recommendation"]
    return f"align layer {found['layer']} of {result['depth']}: {found['reason']}"
