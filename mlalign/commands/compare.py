"""`mlalign compare A B [C ...]`: evaluations of the same test rows side by side, each against the first.

A, B, C are directories that `mlalign evaluate` wrote. Differences are by paired bootstrap: the same rows are drawn for
both. Nothing is generated again, the saved predictions are scored.

compare.md, compare.json   scores, differences with 95% intervals and p, a verdict per group
compare.png                bars per language               tensorboard/   the same, as text and picture
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from rich.table import Table

from mlalign import __version__
from mlalign.comet import kept_scores
from mlalign.durable import write_whole
from mlalign.errors import UserError
from mlalign.plots import plot_scores
from mlalign.predictions import Predictions, read_evaluation, read_predictions, statistics
from mlalign.report import show
from mlalign.rundir import make_writable, refuse_others
from mlalign.scoring import Scores, difference, language_groups, mean, score
from mlalign.tasks import load_task
from mlalign.tracker import console, say


@dataclass(frozen=True)
class Settings:
    """What to compare, and how: the options of the command."""

    evaluations: tuple[Path, ...]
    output: Path
    names: list[str] | None = None
    metric: str | None = None
    supervised: list[str] | None = None
    aligned: list[str] | None = None
    seed: int = 0


def compare(settings: Settings) -> dict:
    """Compare, write and show; returns what `compare.json` holds.

    Raises UserError where the evaluations are not of the same task and test rows.
    """
    names = _names(settings)
    make_writable(settings.output, "output")
    refuse_others(settings.output, "compare.json")
    evaluations = [read_evaluation(folder) for folder in settings.evaluations]
    task = load_task(evaluations[0]["task"])
    systems = _scores(settings, task, evaluations)
    metric = settings.metric or task.MAIN
    _refuse_unknown(metric, systems)
    result = _result(settings, names, evaluations, systems, metric)
    bars = {
        name: {language: scores[language].point[metric] for language in scores} for name, scores in zip(names, systems)
    }
    text = _markdown(result)
    try:
        write_whole(settings.output / "compare.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        write_whole(settings.output / "compare.md", text)
        plot_scores(bars, settings.output / "compare.png", metric)
        _log(text, settings.output)
    except OSError as error:
        raise UserError(f"output {settings.output} cannot be written: {error.strerror or error}") from error
    _print(result)
    say(f"in {settings.output}: compare.md, compare.json and compare.png")
    return result


# ------------------------------------------------------------------------------------------------------------- input


def _names(settings: Settings) -> list[str]:
    """One for each evaluation: those given, else the last parts of the paths in which they differ."""
    count = len(settings.evaluations)
    if count < 2:
        raise UserError("compare needs two evaluations or more")
    names = settings.names
    if names is None:
        paths = [folder.resolve().parts for folder in settings.evaluations]
        while len({parts[-1] for parts in paths}) == 1 and all(len(parts) > 1 for parts in paths):
            paths = [parts[:-1] for parts in paths]
        names = [parts[-1] for parts in paths]
    if len(names) != count:
        raise UserError(f"names are {len(names)}, but there are {count} evaluations")
    if len(set(names)) < count:
        raise UserError(f"two of the evaluations are called {', '.join(names)}: tell them apart by --names")
    return names


def _scores(settings: Settings, task: ModuleType, evaluations: list[dict]) -> list[dict[str, Scores]]:
    """Language -> scores, of each evaluation; with the same rows drawn."""
    first, baseline = settings.evaluations[0], evaluations[0]
    systems: list[dict[str, Scores]] = [{} for _ in evaluations]
    for folder, evaluation in zip(settings.evaluations, evaluations):
        if evaluation["task"] != baseline["task"]:
            raise UserError(f"{first} is an evaluation of {baseline['task']}, but {folder} of {evaluation['task']}")
        odd = sorted(evaluation["rows"].keys() ^ baseline["rows"].keys())
        if odd:
            raise UserError(f"{first} and {folder} have different test sets: only one of them has {', '.join(odd)}")
    for language in sorted(baseline["rows"]):
        read = [
            read_predictions(folder, language, evaluation["rows"][language])
            for folder, evaluation in zip(settings.evaluations, evaluations)
        ]
        for folder, predictions in zip(settings.evaluations, read):
            _refuse_other_rows(first, folder, language, read[0], predictions)
        counts = [statistics(task, each, language, folder) for folder, each in zip(settings.evaluations, read)]
        comet = [
            kept_scores(each, folder / "comet" / f"{language}.json") for folder, each in zip(settings.evaluations, read)
        ]
        models = {each[0] for each in comet if each is not None}
        if len(models) > 1 and settings.metric == "comet":
            raise UserError(f"comet is by different models, {' and '.join(sorted(models))}: evaluate with one --comet")
        for scores, columns, sentences in zip(systems, counts, comet):
            if len(models) == 1 and None not in [each and each[0] for each in comet]:
                columns["comet"] = sentences[1]
            scores[language] = score(task, columns, read[0].ids, language, settings.seed)
    return systems


def _refuse_unknown(metric: str, systems: list[dict[str, Scores]]) -> None:
    """Raises UserError for a metric that is not there, or not in every language."""
    everywhere = [scores.point for system in systems for scores in system.values()]
    lacking = sorted({code for system in systems for code, scores in system.items() if metric not in scores.point})
    if lacking:
        known = [name for name in everywhere[0] if all(name in point for point in everywhere)]
        if any(metric in point for point in everywhere):
            raise UserError(f"metric {metric} is missing in {', '.join(lacking)}: choose one of {', '.join(known)}")
        raise UserError(f"metric {metric} is not one of {', '.join(known)}")


def _refuse_other_rows(first: Path, folder: Path, language: str, wanted: Predictions, found: Predictions) -> None:
    other = f"{first} and {folder} have different test sets"
    if len(wanted.golds) != len(found.golds):
        raise UserError(f"{other}: {len(wanted.golds)} and {len(found.golds)} rows of {language}")
    for number, (a, b) in enumerate(zip(wanted.golds, found.golds), 1):
        if a != b:
            raise UserError(f"{other}: row {number} of {language} is not the same")


# --------------------------------------------------------------------------------------------------------- comparing


def _result(
    settings: Settings, names: list[str], evaluations: list[dict], systems: list[dict[str, Scores]], metric: str
) -> dict:
    """What `compare.json` holds.

    mlalign, task, metric, names, evaluations   what was compared; the first is what the others are compared with
    languages, groups    language, or group -> {languages, scores: name -> score, differences: name -> {delta, low,
                         high, p}}: a group is the mean of its languages
    verdicts             group -> a sentence for each system but the first
    """
    known = [_training(folder) for folder in settings.evaluations]
    training = {
        name: _first(getattr(settings, name), sorted({code for each in known for code in each[name]}))
        for name in ("supervised", "aligned")
    }
    members = language_groups(
        list(systems[0]), training["supervised"], training["aligned"], evaluations[0]["task"] == "translation"
    )
    languages = {language: _row([scores[language] for scores in systems], names, metric) for language in systems[0]}
    lower = load_task(evaluations[0]["task"]).LOWER_IS_BETTER
    groups = {}
    for group, codes in members.items():
        means = [mean([scores[code] for code in codes]) for scores in systems]
        groups[group] = {"languages": codes, **_row(means, names, metric)}
    return {
        "mlalign": __version__,
        "task": evaluations[0]["task"],
        "metric": metric,
        "names": names,
        "evaluations": [str(folder) for folder in settings.evaluations],
        "languages": languages,
        "groups": groups,
        "verdicts": {
            group: [_verdict(group, name, names[0], row, languages, metric, lower) for name in names[1:]]
            for group, row in groups.items()
        },
        **training,
        "seed": settings.seed,
    }


def _first(given: list[str] | None, known: list[str]) -> list[str]:
    return known if given is None else given


def _training(folder: Path) -> dict[str, list[str]]:
    """Languages of the training's labels and of its bitext, as the evaluation's report has them."""
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text())
        return {name: list(report[name]) for name in ("supervised", "aligned")}
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no report.json: repeat its `mlalign evaluate` to the end") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as the report of an evaluation: {error}") from error


def _row(scores: list[Scores], names: list[str], metric: str) -> dict:
    differences = [difference(each, scores[0], metric) for each in scores[1:]]
    return {
        "scores": {name: round(each.point[metric], 6) for name, each in zip(names, scores)},
        "differences": {
            name: {key: round(value, 6) for key, value in asdict(each).items()}
            for name, each in zip(names[1:], differences)
        },
    }


def _verdict(
    group: str,
    name: str,
    first: str,
    row: dict,
    languages: dict[str, dict],
    metric: str,
    lower_is_better: tuple[str, ...],
) -> str:
    found = row["differences"][name]
    ups = sum(languages[code]["differences"][name]["delta"] > 0 for code in row["languages"])
    numbers = f"{_signed(metric, found['delta'])} {metric} {_interval(metric, found)}, p {_p(found['p'])}"
    if found["low"] <= 0 <= found["high"]:
        return f"{group}: {name} and {first} do not differ beyond chance: {numbers}"
    better = "better" if (found["delta"] > 0) != (metric in lower_is_better) else "worse"
    return f"{group}: {name} is {better} than {first}: {numbers}, higher in {ups} of {len(row['languages'])}"


def _signed(metric: str, value: float) -> str:
    return f"{'+' if value >= 0 else '-'}{show(metric, abs(value))}"


def _interval(metric: str, found: dict) -> str:
    return f"[{_signed(metric, found['low'])}, {_signed(metric, found['high'])}]"


def _p(value: float) -> str:
    return "< 0.002" if value < 0.002 else f"{value:.3f}"


# ----------------------------------------------------------------------------------------------------------- showing


def _cells(result: dict, row: dict, short: bool = False) -> list[str]:
    """Scores and differences; a short difference has a star in place of interval and p."""
    metric = result["metric"]
    cells = [show(metric, score) for score in row["scores"].values()]
    for found in row["differences"].values():
        cell = _signed(metric, found["delta"])
        if short:
            cells.append(cell + (" " if found["low"] <= 0 <= found["high"] else "*"))
        else:
            cells.append(f"{cell} {_interval(metric, found)}, p {_p(found['p'])}")
    return cells


def _head(result: dict) -> list[str]:
    return [*result["names"], *(f"{name} - {result['names'][0]}" for name in result["names"][1:])]


def _markdown(result: dict) -> str:
    lines = [f"# {result['task']}: {result['metric']} of {', '.join(result['names'])}", ""]
    lines += [f"- {verdict}" for verdicts in result["verdicts"].values() for verdict in verdicts] + [""]
    for label, rows in (("mean of group", result["groups"]), ("language", result["languages"])):
        head = [label, *_head(result)]
        lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join([name, *_cells(result, row)])} |" for name, row in rows.items()] + [""]
    lines += ["In brackets: 95% intervals of the difference, by paired bootstrap over rows.", ""]
    return "\n".join(lines)


def _log(text: str, output: Path) -> None:
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter  # here: it takes a second

    for old in (output / "tensorboard").glob("events.*"):  # of an earlier comparison in the same place
        old.unlink()
    with SummaryWriter(str(output / "tensorboard")) as writer:
        writer.add_text("compare", text, 0)
        writer.add_image("compare", imread(output / "compare.png")[..., :3], 0, dataformats="HWC")


def _print(result: dict) -> None:
    for label, rows in (("language", result["languages"]), ("mean of group", result["groups"])):
        table = Table(label, *_head(result))
        for name, row in rows.items():
            table.add_row(name, *_cells(result, row, short=True))
        console.print(table)
    say("* the 95% interval of the difference leaves out 0")
    for verdicts in result["verdicts"].values():
        for verdict in verdicts:
            say(verdict)
