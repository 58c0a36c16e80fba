"""`mlalign merge TASK_ADAPTER ALIGNMENT_ADAPTER --output DIR`: two adapters of one base model become one.

merged = (1 - weight) * task + weight * alignment, on the deltas; see `merging` for the methods. `--layers K`, for an
alignment adapter that was trained at layer K, leaves the task adapter whole above it. `--weight auto --dev FILES`
merges at every weight of `--grid`, evaluates each, and takes the best; after an interruption it goes on.

adapter_config.json, adapter_model.safetensors   the merged adapter, for peft, `mlalign evaluate` or vLLM
merge.json                                       what it was made of, see `_result`
mlalign.json                                     the languages of both trainings, where they are known
tuning/, weights.png                             of `auto`: adapter and evaluation at each weight, and the curve
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import save_file

from mlalign import __version__, distributed, merging
from mlalign.config import Model
from mlalign.durable import settle, write_whole
from mlalign.errors import UserError, one_line
from mlalign.merged_config import adapter_config
from mlalign.merging import CONFIG, SPARSE, WEIGHTS, Adapter, Merged, Recipe
from mlalign.model import load_model_config
from mlalign.plots import plot_curve
from mlalign.rundir import held, refuse_others
from mlalign.tracker import console, say

_GRID = tuple(step / 10 for step in range(11))
_OF_AUTO = ("dev", "task", "grid", "max_rows", "batch_size", "max_new_tokens")  # options


@dataclass(frozen=True)
class Settings:
    """What to merge, and how: the options of the command. None = not given."""

    task_adapter: str
    alignment_adapter: str
    output: Path
    weight: float | str = 0.5  #: a number, or auto
    method: str = "linear"
    layers: int | None = None
    rank: int | None = None
    density: float | None = None
    seed: int | None = None
    model: str | None = None
    dev: tuple[str, ...] = ()
    task: str | None = None
    grid: str | None = None
    max_rows: int | None = None
    batch_size: int | None = None
    max_new_tokens: int | None = None
    trust_remote_code: bool = False


def merge(settings: Settings) -> dict:
    """Merge and write; returns what `merge.json` holds, on every rank. Rank 0 merges, all ranks evaluate."""
    recipe, grid = _recipe(settings), _grid(settings)
    if distributed.launched():
        distributed.init()
    task = merging.read_adapter(settings.task_adapter, "task adapter")
    alignment = merging.read_adapter(settings.alignment_adapter, "alignment adapter")
    merging.check_pair(task, alignment, one_model=settings.model is not None)
    model = settings.model or task.config.get("base_model_name_or_path") or None
    _check_size(settings, task, alignment, model)
    with held(settings.output, "output"):
        return _merge(settings, recipe, grid, task, alignment, model)


def _merge(
    settings: Settings, recipe: Recipe, grid: list[float] | None, task: Adapter, alignment: Adapter, model: str | None
) -> dict:
    with distributed.on_main():
        if distributed.is_main():
            _claim(settings.output, task, alignment)
            _hint(settings, task, alignment)
    tuning = None
    if grid is not None:
        tuning = _tune(settings, recipe, grid, task, alignment, model)
        recipe = replace(recipe, weight=tuning["best"])
    result = None
    with distributed.on_main():
        if distributed.is_main():
            if tuning:
                result = _take(settings.output, _candidate(settings, recipe.weight) / "adapter", tuning)
            else:
                result = _write(settings.output, recipe, task, alignment)
            _show(result, settings.output)
    return distributed.broadcast_object(result)


# ------------------------------------------------------------------------------------------------------------- input


def _recipe(settings: Settings) -> Recipe:
    """The options as a recipe; its weight is 0 for auto. Raises UserError for one that is wrong or has no use."""
    auto = settings.weight == "auto"
    if settings.method not in merging.METHODS:
        raise UserError(f"method {settings.method} is not one of {', '.join(merging.METHODS)}")
    weight = 0.0 if auto else _share(settings.weight, "weight", "a number from 0 to 1, or auto")
    for name in _OF_AUTO:
        if getattr(settings, name) not in (None, ()) and not auto:
            raise UserError(f"{name} belongs to --weight auto, and the weight is {settings.weight}")
    if auto and not settings.dev:
        raise UserError("weight auto needs dev: name task rows with `lang` by --dev")
    if auto and settings.task is None:
        raise UserError("weight auto needs a task, which says how answers are scored: name it by --task")
    if settings.layers is not None and settings.layers < 1:
        raise UserError(f"layers is {settings.layers}, it must be 1 or more")
    if settings.rank is not None and settings.rank < 1:
        raise UserError(f"rank is {settings.rank}, it must be 1 or more")
    sparse = settings.method in SPARSE
    if settings.density is not None and not sparse:
        raise UserError(f"density belongs to {', '.join(SPARSE)}, and the method is {settings.method}")
    if settings.seed is not None and not settings.method.startswith("dare"):
        raise UserError(f"seed belongs to dare_linear and dare_ties, and the method is {settings.method}")
    density = 0.5 if settings.density is None else settings.density
    if not 0 < density <= 1:
        raise UserError(f"density is {density}, it must be above 0 and at most 1")
    return Recipe(weight, settings.method, settings.layers, settings.rank, density, settings.seed or 0)


def _grid(settings: Settings) -> list[float] | None:
    """Weights to try, ascending; None where the weight is given."""
    if settings.weight != "auto":
        return None
    texts = settings.grid.split(",") if settings.grid is not None else _GRID
    grid = [_share(text, "grid", "numbers from 0 to 1, such as 0,0.25,0.5") for text in texts]
    if len({f"{weight:.2f}" for weight in grid}) < len(grid) or any(round(each, 2) != each for each in grid):
        raise UserError(f"grid {settings.grid} must hold different numbers of at most two decimals")
    return sorted(grid)


def _share(value: float | str, name: str, wanted: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise UserError(f"{name} is {value}, it must be {wanted}")
    return number


def _check_size(settings: Settings, task: Adapter, alignment: Adapter, model: str | None) -> None:
    """Raises UserError for a rank, or a layer, that the base model does not have."""
    if settings.rank is not None:
        sides = {module: min(merging.shape(each)) for module, each in (task.factors | alignment.factors).items()}
        smallest = min(sides, key=sides.get)
        if settings.rank > sides[smallest]:
            raise UserError(f"rank is {settings.rank}, but {smallest} has no rank above {sides[smallest]}")
    if model is None and (settings.layers is not None or settings.weight == "auto"):
        raise UserError(f"model is needed, and {task.folder / CONFIG} names none: give --model")
    if settings.layers is not None:
        try:
            source = Model(path=model, trust_remote_code=settings.trust_remote_code)
            depth = load_model_config(source).get_text_config().num_hidden_layers
        except UserError as error:
            raise UserError(f"layers cannot be checked, name the base model by --model: {error}") from error
        if settings.layers > depth:
            raise UserError(f"layers is {settings.layers}, but {model} has {depth} decoder blocks")
        stacks = sorted({merging.stack(module) for module in task.factors | alignment.factors} - {None})
        if len(stacks) > 1:
            raise UserError(f"layers is ambiguous: the adapters have modules in {' and in '.join(stacks)}")


def _claim(output: Path, task: Adapter, alignment: Adapter) -> None:
    """Refuse an output directory that holds something else."""
    refuse_others(output, "merge.json")
    for folder in (output, *sorted(output.glob("tuning/*/adapter"))):
        if (folder / CONFIG).exists() and _inputs(_read_result(folder)) != [task.fingerprint, alignment.fingerprint]:
            raise UserError(f"output {folder} holds an adapter that was not made of these two: choose another --output")


def _read_result(folder: Path) -> dict:
    """What `merge.json` holds; empty where there is none."""
    try:
        result = json.loads((folder / "merge.json").read_text())
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def _inputs(result: dict) -> list[str]:
    return [each["fingerprint"] for each in result.get("inputs", {}).values()]


def _hint(settings: Settings, task: Adapter, alignment: Adapter) -> None:
    """Say what the merge leaves out, and where it only shrinks the task."""
    if settings.layers is not None:
        lost = merging.left_out(alignment, settings.layers)
        if lost:
            say(f"{alignment.folder} is not zero in {len(lost)} modules above layer {settings.layers}: left out")
        return
    last, blocks = merging.aligned_blocks(alignment), merging.aligned_blocks(task)
    if last and (blocks is None or last < blocks):
        say(f"{alignment.folder} is zero above layer {last}: with --layers {last} the task adapter stays whole there")


# ------------------------------------------------------------------------------------------------------------ tuning


def _tune(
    settings: Settings, recipe: Recipe, grid: list[float], task: Adapter, alignment: Adapter, model: str
) -> dict[str, Any]:
    """Evaluate the merged adapter at every weight. The best has the highest mean; of equals, the smallest weight.

    Returns: metric, weights, mean [weight], languages: language -> [weight], and best. Called by all ranks.
    """
    from mlalign.commands.evaluate import Settings as Evaluation
    from mlalign.commands.evaluate import evaluate

    given = {name: getattr(settings, name) for name in ("max_rows", "batch_size", "max_new_tokens")}
    reports = []
    for weight in grid:
        folder = _candidate(settings, weight)
        with distributed.on_main():
            if distributed.is_main():
                _make_candidate(folder, replace(recipe, weight=weight), task, alignment)
        evaluation = Evaluation(
            model=model,
            test=settings.dev,
            adapters=(str(folder / "adapter"),),
            output=folder / "evaluation",
            task=settings.task,
            trust_remote_code=settings.trust_remote_code,
            quiet=True,
            **{name: value for name, value in given.items() if value is not None},
        )
        (report,) = evaluate(evaluation)
        reports.append(report)
        say(f"weight {weight:.2f}: {report['main']} {report['groups']['all']['scores'][report['main']]:.3f}")
    metric = reports[0]["main"]
    scores = {language: [each["scores"][metric][language] for each in reports] for language in reports[0]["rows"]}
    mean = [sum(values) / len(values) for values in zip(*scores.values())]
    best = grid[mean.index(max(mean))]
    tuning = {"metric": metric, "weights": grid, "mean": mean, "languages": scores, "best": best}
    with distributed.on_main():
        if distributed.is_main():
            _show_curve(tuning, reports, settings.output)
    return tuning


def _candidate(settings: Settings, weight: float) -> Path:
    return settings.output / "tuning" / f"{weight:.2f}"


def _make_candidate(folder: Path, recipe: Recipe, task: Adapter, alignment: Adapter) -> None:
    """Write the adapter of one weight, unless this very one is there; an evaluation of another goes."""
    if (folder / "adapter" / CONFIG).exists():
        before = _read_result(folder / "adapter")
        wanted = [task.fingerprint, alignment.fingerprint]
        if before.get("settings") == _asked(recipe) and _inputs(before) == wanted:
            return
    for old in ("adapter", "evaluation"):
        shutil.rmtree(folder / old, ignore_errors=True)
    _write(folder / "adapter", recipe, task, alignment)


def _show_curve(tuning: dict[str, Any], reports: list[dict], output: Path) -> None:
    """The curve as a table, with the means of the groups that training knew, and as a picture."""
    metric, best = tuning["metric"], tuning["best"]
    groups = [name for name in ("supervised", "aligned", "unseen") if name in reports[0]["groups"]]
    table = Table("weight", f"{metric}, mean", *groups)
    for weight, mean, report in zip(tuning["weights"], tuning["mean"], reports):
        cells = [f"{mean:.3f}", *(f"{report['groups'][name]['scores'][metric]:.3f}" for name in groups)]
        table.add_row(f"{weight:.2f}", *cells, style="bold" if weight == best else None)
    console.print(table)
    if len(set(tuning["mean"])) == 1:
        say("every weight has the same score: these dev rows do not tell them apart, and the smallest weight is taken")
    say(f"best weight {best:.2f}, {metric} {max(tuning['mean']):.3f}")
    try:
        path, labels = output / "weights.png", ("merge weight", metric)
        plot_curve(tuning["weights"], tuning["mean"], tuning["languages"], best, labels, path)
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror or error}") from error


# ----------------------------------------------------------------------------------------------------------- writing


def _write(folder: Path, recipe: Recipe, task: Adapter, alignment: Adapter) -> dict:
    """Merge, and write the adapter and what belongs to it; returns what `merge.json` holds. On rank 0.

    What is there already stays, so that evaluations of it go on being evaluations of it.
    """
    before = _read_result(folder)
    inputs = [task.fingerprint, alignment.fingerprint]
    same = _inputs(before) == inputs and before.get("settings") == _asked(recipe) and before.get("tuning") is None
    if (folder / CONFIG).exists() and same:
        return before
    merged = merging.merge_adapters(task, alignment, recipe, distributed.device())
    result = _result(merged, recipe, task, alignment)
    beside = {"merge.json": result}
    languages = _languages(task, alignment)
    if languages is not None:
        beside["mlalign.json"] = languages
    save = partial(save_file, merging.tensors(merged), metadata={"format": "pt"})
    _write_adapter(folder, save, adapter_config(merged, task, alignment), beside)
    return result


def _take(folder: Path, candidate: Path, tuning: dict[str, Any]) -> dict:
    """Write the very adapter that was evaluated best: made again, on another device, dare would drop other entries."""
    result = _read_result(candidate) | {"tuning": tuning}
    if (folder / CONFIG).exists() and _read_result(folder) == result:
        return result
    beside = {"merge.json": result}
    if (candidate / "mlalign.json").exists():
        beside["mlalign.json"] = json.loads((candidate / "mlalign.json").read_text())
    save = partial(shutil.copyfile, candidate / WEIGHTS)
    _write_adapter(folder, save, json.loads((candidate / CONFIG).read_text()), beside)
    return result


def _asked(recipe: Recipe) -> dict[str, Any]:
    """The recipe as `merge.json` holds it; null for what the method does not use."""
    return {
        "method": recipe.method,
        "weight": recipe.weight,
        "layers": recipe.layers,
        "rank": recipe.rank,
        "density": recipe.density if recipe.method in SPARSE else None,
        "seed": recipe.seed if recipe.method.startswith("dare") else None,
    }


def _result(merged: Merged, recipe: Recipe, task: Adapter, alignment: Adapter) -> dict[str, Any]:
    """What `merge.json` holds.

    inputs           task and alignment -> path and fingerprint of the adapter
    settings         method, weight, layers, rank, density, seed, as asked for
    modules, rank    of the merged adapter
    kept             share of the squared Frobenius norm that the cut to `rank` left: of all modules, of the worst
    tuning           of `--weight auto`: metric, weights, mean, languages -> scores, best; else null
    """
    module, share = merged.worst()
    inputs = {"task": task, "alignment": alignment}
    return {
        "mlalign": __version__,
        "inputs": {name: {"path": str(each.folder), "fingerprint": each.fingerprint} for name, each in inputs.items()},
        "settings": _asked(recipe),
        "modules": len(merged.factors),
        "rank": merged.rank,
        "kept": {"share": round(merged.share(), 6), "worst_module": module, "worst_share": round(share, 6)},
        "tuning": None,
    }


def _languages(*adapters: Adapter) -> dict[str, list[str]] | None:
    """Languages of both adapters' training, for `mlalign evaluate`; None where nothing is known."""
    found: dict[str, list[str]] = {"supervised": [], "aligned": []}
    paths = [path for adapter in adapters if (path := adapter.folder / "mlalign.json").exists()]
    for path in paths:
        try:
            known = json.loads(path.read_text())
            for name, languages in found.items():
                languages += [each for each in known[name] if each not in languages]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} must hold lists `supervised` and `aligned` of languages: {error!r}") from error
    return found if paths else None


def _write_adapter(folder: Path, save: Callable[[Path], Any], config: dict[str, Any], beside: dict[str, Any]) -> None:
    """Write the adapter in peft's format, and JSON files beside it. adapter_config.json comes last: then all is whole.

    Always in fp32: rounding the scaled factors to bf16 would change the deltas by 0.16%. Raises UserError where the
    disk does not take it. `save` writes the weights.
    """
    aside = folder / "adapter_model.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
        save(aside)
        settle(aside)
        aside.rename(folder / WEIGHTS)
        for name, value in beside.items():
            write_whole(folder / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        write_whole(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        reason = one_line(error)
        raise UserError(f"output {folder} cannot be written (is the disk full?): {reason}") from error


def _show(result: dict[str, Any], output: Path) -> None:
    asked, kept = result["settings"], result["kept"]
    where = f" up to layer {asked['layers']}" if asked["layers"] is not None else ""
    modules = f"{result['modules']} modules of rank {result['rank']}"
    say(f"{asked['method']}, weight {asked['weight']:.2f}{where}: {modules} in {output}")
    if kept["worst_share"] < 1:
        worst = f"{kept['worst_share']:.2%} in {kept['worst_module']}, the worst"
        say(f"the cut to rank {result['rank']} kept {kept['share']:.2%} of the squared norm, and {worst}")
