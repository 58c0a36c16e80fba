"""The report of an evaluation: `report.json`, `report.md`, a table on the console and the same in TensorBoard.

`build` makes the dictionary that `report.json` holds:

mlalign, task, main          version, task, and the metric that leads
model, adapter               what was evaluated
rows, empty                  language -> test rows, and how many answers are empty
scores, intervals            metric -> language -> score, and [low, high] of its 95% bootstrap interval
groups                       group -> {languages, scores, intervals}: means over its languages
how                          language -> metric -> signature: what a score was computed by
supervised, aligned          languages of the training's labels and of its bitext, as far as known
bootstrap                    {samples, seed}
"""

import json
from pathlib import Path
from types import ModuleType

from rich.table import Table

from mlalign import __version__
from mlalign.durable import write_whole
from mlalign.predictions import Predictions
from mlalign.scoring import SAMPLES, Counts, Scores, language_groups, mean, score
from mlalign.tracker import console, say

_PERCENT = ("bleu", "chrf++")  # as their library gives them; all other metrics lie between 0 and 1


def build(
    task: ModuleType,
    predictions: dict[str, Predictions],
    counts: dict[str, Counts],
    about: dict,
    training: dict[str, list[str]],
    seed: int,
) -> dict:
    """The report, see above. Args: counts: `tasks.X.statistics` by language; about: model, adapter and task."""
    by_language = {
        language: score(task, counts[language], predictions[language].ids, language, seed)
        for language in sorted(predictions)
    }
    members = language_groups(
        list(by_language), training["supervised"], training["aligned"], about["task"] == "translation"
    )
    report = {
        "mlalign": __version__,
        **about,
        "main": task.MAIN,
        "rows": {language: len(predictions[language].texts) for language in by_language},
        "empty": {language: sum(not text for text in predictions[language].texts) for language in by_language},
        "scores": {},
        "intervals": {},
        "groups": {
            name: {"languages": languages, **_of_group(mean([by_language[each] for each in languages]))}
            for name, languages in members.items()
        },
        "how": {each: task.describe(each, predictions[each].golds) for each in by_language},
        **training,
        "bootstrap": {"samples": SAMPLES, "seed": seed},
    }
    for language, scores in by_language.items():
        for metric, value in scores.point.items():
            report["scores"].setdefault(metric, {})[language] = round(value, 6)
            low, high = scores.interval(metric)
            report["intervals"].setdefault(metric, {})[language] = [round(low, 6), round(high, 6)]
    return report


def _of_group(scores: Scores) -> dict:
    return {
        "scores": {metric: round(value, 6) for metric, value in scores.point.items()},
        "intervals": {metric: [round(end, 6) for end in scores.interval(metric)] for metric in scores.point},
    }


def write(report: dict, folder: Path) -> None:
    """`report.json`, `report.md` and TensorBoard's events. Raises OSError where the disk does not take them."""
    from torch.utils.tensorboard import SummaryWriter  # here: it takes a second, on rank 0 only

    write_whole(folder / "report.md", markdown(report))
    events = folder / "tensorboard"
    for old in events.glob("events.*"):  # of an earlier report in the same place
        old.unlink()
    with SummaryWriter(str(events)) as writer:
        writer.add_text("report", markdown(report), 0)
        for name, group in report["groups"].items():
            for metric, value in group["scores"].items():
                writer.add_scalar(f"{metric}/{name}", value, 0)
    write_whole(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def markdown(report: dict) -> str:
    """Two tables, groups and languages, with intervals; and below them what the scores were computed by."""
    metrics = list(report["scores"])
    lines = [f"# {report['task']}: {report['model']}", ""]
    if report["adapter"]:
        lines += [f"adapter {report['adapter']}", ""]
    lines += _markdown_table(("group", "languages"), metrics, _group_cells(report, metrics))
    lines += ["", *_markdown_table(("language", "rows"), metrics, _language_cells(report, metrics)), ""]
    samples = report["bootstrap"]["samples"]
    lines += [
        f"In brackets: 95% intervals of {samples:,} bootstrap samples over rows; a group is the mean of its languages.",
        "",
    ]
    empty = sum(report["empty"].values())
    if empty:
        lines += [f"{empty:,} of {sum(report['rows'].values()):,} answers are empty.", ""]
    how = {f"- {metric}: {by}" for each in report["how"].values() for metric, by in each.items()}
    return "\n".join([*lines, *sorted(how), ""])


def _markdown_table(head: tuple[str, str], metrics: list[str], rows: list[list[str]]) -> list[str]:
    names = [*head, *metrics]
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _group_cells(report: dict, metrics: list[str]) -> list[list[str]]:
    return [
        [name, str(len(group["languages"])), *(_cell(group, metric) for metric in metrics)]
        for name, group in report["groups"].items()
    ]


def _language_cells(report: dict, metrics: list[str]) -> list[list[str]]:
    return [
        [language, f"{rows:,}", *(_cell(report, metric, language) for metric in metrics)]
        for language, rows in report["rows"].items()
    ]


def _cell(of: dict, metric: str, language: str | None = None) -> str:
    value, interval = of["scores"].get(metric), of["intervals"].get(metric)
    if language is not None:
        value, interval = (value or {}).get(language), (interval or {}).get(language)
    if value is None:
        return "-"
    return f"{show(metric, value)} [{show(metric, interval[0])}, {show(metric, interval[1])}]"


def show(metric: str, value: float) -> str:
    """A score with as many digits as mean something."""
    return f"{value:.1f}" if metric in _PERCENT else f"{value:.3f}"


def print_report(report: dict) -> None:
    """Scores by language and group, on the console of rank 0; intervals of the leading metric, all are in report.md."""
    metrics = [metric for metric in report["scores"] if " " not in metric]  # `f1 PER` and its like are in report.md
    for head, cells in (
        (("language", "rows"), _language_cells(report, metrics)),
        (("mean of group", "languages"), _group_cells(report, metrics)),
    ):
        table = Table(*head, *metrics)
        for row in cells:
            of_leading = len(head) + metrics.index(report["main"])
            table.add_row(*(cell if at == of_leading else cell.partition(" [")[0] for at, cell in enumerate(row)))
        console.print(table)
    empty = sum(report["empty"].values())
    if empty:
        say(f"{empty:,} of {sum(report['rows'].values()):,} answers are empty")
