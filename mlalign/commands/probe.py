"""`mlalign probe MODEL --data DATA --output DIR`: at which layer do the languages of a model meet?

DATA is a directory with one file per language (line n, or `id` x, being the same sentence in all of them), a hub id of
such a dataset, or bitext rows against one pivot language: see `parallel`. Every sentence passes the model once; every
layer is measured over all directions: see `retrieval`. Run it again after an interruption and it goes on; under a
launcher the ranks share the work, and `--deepspeed ds_configs/zero3.json` shards a model that no GPU can hold.

probe.json       what was measured, see `_result`            states/       states of every layer, while they are needed
layers.png       every measure by layer                      tensorboard/  the same curves and pictures
languages.png    accuracy of each language at each layer     transfer.png  accuracy against a task's score
directions.png   accuracy of each direction at the layer to align
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mlalign import __version__, distributed
from mlalign.config import Model
from mlalign.durable import write_whole
from mlalign.errors import UserError
from mlalign.model import adapter_folder, load_model_config
from mlalign.parallel import Parallel, read_parallel
from mlalign.pooling import POOLERS
from mlalign.probe_report import (
    DIRECTED,
    EVERY,
    MEASURES,
    Curves,
    correlate,
    language_groups,
    measure_layer,
    read_report,
    recommend,
    shared_languages,
)
from mlalign.probe_show import draw, log, show
from mlalign.rundir import digest, make_writable, refuse_others
from mlalign.states import Encoder, encode, load_layer, state_files
from mlalign.tracker import say
from mlalign.zero import read_deepspeed, stage


@dataclass(frozen=True)
class Settings:
    """What to probe, and how: the options of the command."""

    model: str
    data: str
    output: Path
    adapter: str | None = None
    compare: str | None = None
    languages: list[str] | None = None
    max_sentences: int | None = None
    layers: str | None = None
    pooling: tuple[str, ...] = ("mean",)
    pool_bos: bool = True
    precision: str = "auto"
    trust_remote_code: bool = False
    batch_size: int = 32
    split: str | None = None
    deepspeed: str | None = None
    keep_states: bool = False
    reports: tuple[Path, ...] = ()
    metric: str | None = None


def probe(settings: Settings) -> dict:
    """Measure, write and show everything; returns what `probe.json` holds, on every rank."""
    if settings.deepspeed and stage(read_deepspeed(settings.deepspeed)) != 3:
        raise UserError(
            f"deepspeed: {settings.deepspeed} is not ZeRO stage 3, and others shard nothing that a probe has"
        )
    if distributed.launched() or settings.deepspeed:
        distributed.init()
    start = time.monotonic()
    if settings.metric and not settings.reports:
        raise UserError(f"metric {settings.metric} belongs to a --report, and there is none")
    reports = {str(path): read_report(path, settings.metric) for path in settings.reports}
    with distributed.on_main():
        if distributed.is_main():
            make_writable(settings.output, "output")
            refuse_others(settings.output, "probe.json")
    encoders = _encoders(settings)
    parallel = read_parallel(settings.data, settings.languages, settings.max_sentences, settings.split)
    _check_reports(reports, parallel)
    folder = settings.output / "states"
    # Rank 0's names count: on another host the same weights may have other times.
    files = distributed.broadcast_object(
        {name: state_files(encoder, parallel, folder) for name, encoder in encoders.items()}
    )
    fingerprint = _fingerprint(parallel, files)
    result = distributed.broadcast_object(_finished(settings.output, fingerprint))
    if result is None:
        say(_describe(parallel, encoders))
        with distributed.on_main():
            if distributed.is_main():
                _check_space(parallel, encoders, files, settings.output)
        with distributed.StopSignals() as signals:
            for name, encoder in encoders.items():
                encode(encoder, parallel, files[name], settings.batch_size, settings.deepspeed, signals.check)
            encoded = time.monotonic()
            distributed.barrier()  # the files are whole before any rank reads them
            measured = _measure(parallel, encoders, files, folder, fingerprint, signals.check)
        result = _result(settings, parallel, encoders, measured, fingerprint)
        say(f"encoding took {encoded - start:.1f} s, scoring {time.monotonic() - encoded:.1f} s")
    else:
        say(f"{settings.output / 'probe.json'} holds this very probe: nothing is measured again")
    curves = _curves(result)
    result["correlation"] = {
        report: {"metric": metric, "languages": [list(pair) for pair in shared_languages(parallel.languages, scores)]}
        | {name: correlate(each, scores) for name, each in curves.items()}
        for report, (metric, scores) in reports.items()
    }
    if distributed.is_main():
        try:
            write_whole(settings.output / "probe.json", json.dumps(_finite(result)) + "\n")
            draw(result, curves, reports, settings.output)
            log(result, curves, settings.output)
            if not settings.keep_states:
                _forget(folder, files, fingerprint)
        except OSError as error:
            raise UserError(f"output {settings.output} cannot be written: {error.strerror or error}") from error
        show(result, curves, settings.output)
    return result


# ------------------------------------------------------------------------------------------------------------- input


def _encoders(settings: Settings) -> dict[str, Encoder]:
    """`model`, or `before` and `after` where two are compared."""
    depth = _depth(settings, settings.model)
    unknown = [name for name in settings.pooling if name not in POOLERS]
    if unknown:
        raise UserError(f"pooling {unknown[0]} is not one of {', '.join(POOLERS)}")
    if len(set(settings.pooling)) < len(settings.pooling):
        raise UserError(f"pooling {','.join(settings.pooling)} names one twice")
    layers = tuple(_layers(settings.layers, depth))
    how = {
        "layers": layers,
        "poolings": settings.pooling,
        "pool_bos": settings.pool_bos,
        "precision": settings.precision,
        "trust_remote_code": settings.trust_remote_code,
    }
    if settings.adapter is not None and not Path(settings.adapter).is_dir():
        raise UserError(f"adapter {settings.adapter} is not a directory")
    adapter = adapter_folder(settings.adapter) if settings.adapter is not None else None
    first = Encoder(settings.model, adapter, **how)
    if settings.compare is None:
        return {"model": first}
    path, compared = _weights(settings.compare, settings.model)
    other = _depth(settings, path)
    if other != depth:
        raise UserError(f"compare {settings.compare} has {other} layers, but {settings.model} has {depth}")
    return {"before": first, "after": Encoder(path, compared, **how)}


def _depth(settings: Settings, model: str) -> int:
    source = Model(path=model, trust_remote_code=settings.trust_remote_code)
    return load_model_config(source).get_text_config().num_hidden_layers


def _layers(text: str | None, depth: int) -> list[int]:
    """`0-8,16` -> [0, 1, ..., 8, 16]; None -> all."""
    if text is None:
        return list(range(depth + 1))
    found = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"layers {text!r} must be numbers and ranges, such as 0-8,16")
        found |= set(range(int(first), int(last or first) + 1))
    if not found - {0}:
        raise UserError(f"layers {text!r} must hold a layer that can be aligned, 1 or higher")
    if max(found) > depth:
        raise UserError(f"layers {text}: {max(found)} is out of range, the model has layers 0 to {depth}")
    return sorted(found)


def _weights(path: str, base: str) -> tuple[str, str | None]:
    """What `--compare` names: an adapter of the model, another model, or a run of `mlalign train`."""
    if not Path(path).is_dir():
        if path.startswith(("/", ".")):
            raise UserError(f"compare {path} is not a directory")
        return path, None
    for folder in (Path(path), Path(path) / "adapter", Path(path) / "model"):
        if (folder / "adapter_config.json").exists():
            return base, str(folder)
        if (folder / "config.json").exists():
            return str(folder), None
    raise UserError(
        f"compare {path} holds no adapter_config.json and no config.json: name an adapter, a model or a run"
    )


def _check_reports(reports: dict[str, tuple[str, dict[str, float]]], parallel: Parallel) -> None:
    for name, (_, scores) in reports.items():
        shared = shared_languages(parallel.languages, scores)
        if len(shared) < 3:
            raise UserError(
                f"report {name} shares {len(shared)} languages with the probe, but a correlation needs 3: it has "
                f"{', '.join(scores)}, the probe {', '.join(parallel.languages)}"
            )


def _check_space(
    parallel: Parallel, encoders: dict[str, Encoder], files: dict[str, dict[str, Path]], output: Path
) -> None:
    """Say what the states take on disk, and refuse before the first sentence what would not fit."""
    needed = 0
    for name, encoder in encoders.items():
        hidden = load_model_config(encoder.source).get_text_config().hidden_size
        missing = sum(len(parallel.texts[language]) for language, path in files[name].items() if not path.exists())
        needed += 4 * missing * hidden * len(encoder.layers) * len(encoder.poolings)
    free = shutil.disk_usage(output).free
    if needed > free:
        raise UserError(
            f"output {output} needs {needed / 2**30:.1f} GiB for states, and {free / 2**30:.1f} GiB are free: give "
            "fewer --layers or --max-sentences, or another --output"
        )
    if needed > 2**30:
        say(f"states will take {needed / 2**30:.1f} GiB in {output}, until all is measured")


def _fingerprint(parallel: Parallel, files: dict[str, dict[str, Path]]) -> str:
    names = sorted(path.name for each in files.values() for path in each.values())
    return digest([names, list(files), parallel.tables])


def _finished(output: Path, fingerprint: str) -> dict | None:
    """An earlier result of the same models, settings and sentences."""
    try:
        result = json.loads((output / "probe.json").read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("fingerprint") == fingerprint else None


# --------------------------------------------------------------------------------------------------------- measuring


def _measure(
    parallel: Parallel,
    encoders: dict[str, Encoder],
    files: dict[str, dict[str, Path]],
    folder: Path,
    fingerprint: str,
    check: Callable[[], None],
) -> dict[tuple[str, str, int], dict[str, np.ndarray]]:
    """(model, pooling, layer) -> measures; the ranks take turns. What is measured is kept, so that nothing is twice.

    Args: check: called by all ranks between layers; may raise to stop.
    """
    work = [
        (name, pooling, number, layer)
        for name, encoder in encoders.items()
        for number, pooling in enumerate(encoder.poolings)
        for layer in range(len(encoder.layers))
    ]
    own = {}
    for first in range(0, len(work), distributed.world_size()):
        check()
        index = first + distributed.rank()
        if index >= len(work):  # the last round has fewer layers than ranks
            continue
        name, pooling, number, layer = work[index]

        def load(language: str, paths=files[name], number=number, layer=layer):
            return load_layer(paths[language], number, layer)

        number_of_layer = encoders[name].layers[layer]
        kept = folder / f"{fingerprint}-{name}-{pooling}-{number_of_layer}.npz"
        if not kept.exists():
            start = time.monotonic()
            found = measure_layer(parallel, load, distributed.device())
            aside = kept.with_suffix(".partial.npz")
            np.savez(aside, **found)
            aside.rename(kept)
            seconds = time.monotonic() - start
            if seconds > 5:
                say(f"measured layer {number_of_layer} of {name}, {pooling}, {seconds:.1f} s")
        own[name, pooling, number_of_layer] = dict(np.load(kept))
    return {key: value for part in distributed.gather_objects(own) for key, value in part.items()}


def _result(
    settings: Settings,
    parallel: Parallel,
    encoders: dict[str, Encoder],
    measured: dict[tuple[str, str, int], dict[str, np.ndarray]],
    fingerprint: str,
) -> dict:
    """What `probe.json` holds; lists by layer are in the order of `layers`, matrices [src][tgt] in that of `languages`.

    mlalign, settings, fingerprint   what was run
    languages, groups                codes, and group -> codes
    tables                           [{languages, sentences}]: one, or one per language pair of bitext
    depth, layers                    of the model; those measured
    recommendation                   {layer, accuracy, reason}, of the first model and pooling
    models                           model ("model", or "before" and "after") -> pooling -> {
        mean                             measure -> [layer]: over all directions
        groups                           group -> measure -> [layer]: over its languages' directions from and to them
        by_language                      measure -> [layer][language]
        directions                       measure -> [layer][src][tgt], null where nothing was measured}
    correlation                      report -> {metric, languages, and of each model by layer pearson, pearson_p, ...}
    """
    first = next(iter(encoders.values()))
    layers = list(first.layers)
    models: dict[str, dict] = {}
    for name, encoder in encoders.items():
        for pooling in encoder.poolings:
            each = [measured[name, pooling, layer] for layer in layers]
            directions = {measure: np.stack([layer[measure] for layer in each]).round(6) for measure in DIRECTED}
            separability = np.stack([layer["separability"] for layer in each]).round(6)
            curves = Curves(parallel.languages, directions, separability)
            models.setdefault(name, {})[pooling] = _summary(curves)
    depth = _depth(settings, settings.model)
    result = {
        "mlalign": __version__,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "fingerprint": fingerprint,
        "languages": parallel.languages,
        "groups": language_groups(parallel.languages),
        "tables": [
            {"languages": sorted(table), "sentences": len(next(iter(table.values())))} for table in parallel.tables
        ],
        "depth": depth,
        "layers": layers,
        "models": models,
    }
    result["settings"].pop("reports")
    result["settings"].pop("metric")
    tables = [table["sentences"] for table in result["tables"]]
    result["recommendation"] = recommend(next(iter(_curves(result).values())), layers, depth, tables)
    return result


def _summary(curves: Curves) -> dict:
    groups = language_groups(curves.languages)
    return {
        "mean": {measure: curves.mean(measure).tolist() for measure in MEASURES},
        "groups": {
            group: {measure: curves.mean(measure, members).tolist() for measure in MEASURES}
            for group, members in groups.items()
            if group != EVERY
        },
        "by_language": {measure: curves.by_language(measure).tolist() for measure in MEASURES},
        "directions": {measure: values.tolist() for measure, values in curves.directions.items()},
    }


def _curves(result: dict) -> dict[str, Curves]:
    """Name of model, and of pooling where there are several -> what was measured; null is NaN."""
    curves = {}
    for name, poolings in result["models"].items():
        for pooling, values in poolings.items():
            label = f"{name}, {pooling}" if len(poolings) > 1 else name
            directions = {measure: np.array(each, dtype=float) for measure, each in values["directions"].items()}
            separability = np.array(values["by_language"]["separability"], dtype=float)
            curves[label] = Curves(result["languages"], directions, separability)
    return curves


def _forget(folder: Path, files: dict[str, dict[str, Path]], fingerprint: str) -> None:
    """Delete the states of this probe, and no other's."""
    for path in [*(path for each in files.values() for path in each.values()), *folder.glob(f"{fingerprint}-*.npz")]:
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _finite(value):
    """NaN as null, which JSON has."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _describe(parallel: Parallel, encoders: dict[str, Encoder]) -> str:
    sentences = sum(len(texts) for texts in parallel.texts.values())
    layers = len(next(iter(encoders.values())).layers)
    return (
        f"{len(parallel.languages)} languages, {parallel.directions:,} directions, {sentences:,} sentences, "
        f"{layers} layers, {distributed.world_size()} ranks"
    )
