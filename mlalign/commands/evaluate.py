"""`mlalign evaluate MODEL --task T --test 'test.*.jsonl' --output DIR`: generate answers, and score them per language.

Test rows are task rows as for training, each with `lang`. An interrupted evaluation goes on with the languages it
lacks; under a launcher the ranks share every language's batches, and the answers do not depend on their number. Several
`--adapter` are evaluated one after the other, each into its own directory. `--score-only` scores what is there.

evaluation.json   what the predictions were made with      report.json, report.md   see `report`
predictions/      one file per language, see `predictions`  tensorboard/             the same, as text and scalars
comet/            with --comet: a score per row
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from langcodes import tag_is_valid

from mlalign import distributed, jobs, report
from mlalign.comet import comet_scores
from mlalign.config import Model
from mlalign.data import answer_text, encode_prompt
from mlalign.durable import write_whole
from mlalign.errors import UserError, one_line
from mlalign.generation import Decoding, open_backend
from mlalign.model import adapter_file, adapter_folder, load_model_config, load_tokenizer, precision_dtype
from mlalign.predictions import (
    Predictions,
    prediction_file,
    read_evaluation,
    read_predictions,
    statistics,
    write_predictions,
)
from mlalign.rows import is_local, matching, read_file, row_id
from mlalign.rundir import digest, files_of, held, refuse_others
from mlalign.scoring import sides
from mlalign.tasks import load_task
from mlalign.tracker import say

_DECODED = ("backend", "precision", "beams", "batch_size", "max_new_tokens", "trust_remote_code")


@dataclass(frozen=True)
class Settings:
    """What to evaluate, and how: the options of the command."""

    output: Path
    task: str
    model: str | None = None
    test: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    backend: str = "hf"
    precision: str = "auto"
    beams: int = 1
    batch_size: int = 32
    max_new_tokens: int = 128
    trust_remote_code: bool = False
    max_rows: int | None = None
    comet: str | None = None
    supervised: list[str] | None = None
    aligned: list[str] | None = None
    seed: int = 0
    score_only: bool = False
    quiet: bool = False  #: nothing on the console; for `mlalign merge`, which evaluates many times


@dataclass
class _Tests:
    """Test rows of one language."""

    ids: list = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    golds: list[dict] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)  #: as they were written


def evaluate(settings: Settings) -> list[dict]:
    """Evaluate the model, or each of its adapters; returns what each `report.json` holds, on every rank."""
    task = load_task(settings.task)
    if distributed.launched():
        distributed.init()
    if settings.comet is not None and distributed.world_size() > 1:
        raise UserError(
            "comet scores in one process: evaluate without it first, then with --score-only and no launcher"
        )
    if settings.score_only:
        unused = [name for name in ("model", "test", "adapters", "max_rows") if getattr(settings, name)]
        if unused:
            raise UserError(f"{unused[0]} is not used with --score-only, which scores what {settings.output} holds")
        reports = []
        for folder in _scored(settings.output):
            with held(folder, "output"):
                reports.append(_report(settings, task, folder))
        return reports
    if settings.model is None or not settings.test:
        raise UserError("evaluate needs a MODEL and --test files, unless --score-only scores what an OUTPUT holds")
    adapters = _adapters(settings)
    source = Model(path=settings.model, trust_remote_code=settings.trust_remote_code)
    tokenizer = load_tokenizer(source)
    if tokenizer.pad_token_id is None and not settings.quiet:
        say(f"the tokenizer of {settings.model} has no padding token: masked zeros take its place")
    tests = _read_tests(settings, task, source, tokenizer)
    reports = []
    with distributed.StopSignals() as signals:
        for folder, adapter in adapters.items():
            decoding = Decoding(
                model=settings.model,
                adapter=adapter,
                **{name: getattr(settings, name) for name in _DECODED},
            )
            with held(folder, "output"):
                _predict(settings, decoding, tests, folder, tokenizer, signals.check)
                reports.append(_report(settings, task, folder))
    return reports


# ------------------------------------------------------------------------------------------------------------- input


def _adapters(settings: Settings) -> dict[Path, str | None]:
    """Output directory -> adapter: OUTPUT itself for none or one, OUTPUT/<name> for each of several."""
    found = [adapter_folder(adapter) for adapter in settings.adapters]
    if len(found) < 2:
        return {settings.output: found[0] if found else None}
    names = [Path(path).parent.name if Path(path).name == "adapter" else Path(path).name for path in found]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"two adapters are called {repeated}: evaluate them apart, each with an --output of its own")
    return {settings.output / name: path for name, path in zip(names, found)}


def _read_tests(settings: Settings, task: ModuleType, source: Model, tokenizer) -> dict[str, _Tests]:
    """Language -> its rows, up to `max_rows` each. Raises UserError, naming file and line, for a row without gold."""
    config = load_model_config(source).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    tests: dict[str, _Tests] = {}
    for path in _files(settings.test):
        for where, row in read_file(path):
            language = _language(row, where, settings.task == "translation")
            of = tests.setdefault(language, _Tests())
            if settings.max_rows is not None and len(of.ids) == settings.max_rows:
                continue
            prompt = encode_prompt(row, where, tokenizer)
            if positions is not None and len(prompt) + settings.max_new_tokens > positions:
                raise UserError(
                    f"{where}: the prompt has {len(prompt)} tokens, and with max_new_tokens {settings.max_new_tokens} "
                    f"that is more than the model's {positions} positions"
                )
            of.rows.append(row)
            of.ids.append(row_id(row))
            of.prompts.append(prompt)
            of.golds.append(task.gold(row, answer_text(row, where), where))
    if not tests:
        raise UserError(f"{' '.join(settings.test)} hold no rows")
    return tests


def _files(patterns: tuple[str, ...]) -> list[str]:
    """The files of all patterns, each once: a row that counts twice would make every interval too narrow."""
    found: dict[str, None] = {}
    for pattern in patterns:
        if not is_local(pattern):
            raise UserError(f"test {pattern} is no local file: download it, or name it with its suffix")
        paths = matching(pattern)
        if not paths:
            raise UserError(f"{pattern} matches no file")
        found |= dict.fromkeys(str(Path(path).resolve()) for path in paths)
    return list(found)


def _language(row: dict, where: str, directions: bool) -> str:
    language = row.get("lang")
    if not isinstance(language, str):
        raise UserError(f"{where}: no text in field 'lang', which the report is by (found {', '.join(row)})")
    wrong = [side for side in sides(language, directions) if not tag_is_valid(side)]
    if wrong:
        raise UserError(
            f"{where}: lang is {language!r}, and {wrong[0]!r} is not a language: use ISO 639 codes, such as de or "
            "deu_Latn, or a direction such as en-de"
        )
    return language


# -------------------------------------------------------------------------------------------------------- generating


def _predict(
    settings: Settings,
    decoding: Decoding,
    tests: dict[str, _Tests],
    folder: Path,
    tokenizer,
    check: Callable[[], None],
) -> None:
    """Write the prediction files that are missing. Called by all ranks; rank 0 alone reads and writes files."""
    with distributed.on_main():
        if distributed.is_main():
            _claim(settings, decoding, tests, folder)
    missing = distributed.broadcast_object(
        [each for each in sorted(tests) if not prediction_file(folder, each).exists()]
    )
    if len(missing) < len(tests) and not settings.quiet:
        say(f"{len(tests) - len(missing)} of {len(tests)} languages are in {folder / 'predictions'} already")
    generate = open_backend(decoding, tokenizer) if missing else None
    for number, language in enumerate(missing, len(tests) - len(missing) + 1):
        of, start = tests[language], time.monotonic()
        texts = generate(of.prompts, check)
        with distributed.on_main():
            if distributed.is_main():
                try:
                    write_predictions(folder, language, Predictions(of.ids, texts, of.golds))
                except OSError as error:
                    raise UserError(f"output {folder} cannot be written: {error.strerror or error}") from error
                jobs.say_progress(f"{folder}: {number} languages")
        seconds = time.monotonic() - start
        if not settings.quiet:
            say(f"{language}: {len(texts):,} answers, {seconds:.1f} s, {len(texts) / seconds:.1f} per second")


def _claim(settings: Settings, decoding: Decoding, tests: dict[str, _Tests], folder: Path) -> None:
    """Refuse an output directory with predictions of other settings, weights or test rows."""
    refuse_others(folder, "evaluation.json")
    how = asdict(decoding) | {
        "precision": {torch.float32: "fp32", torch.bfloat16: "bf16"}[precision_dtype(decoding.precision)],
        "task": settings.task,
        "max_rows": settings.max_rows,
        "weights": digest([files_of(decoding.model), _revision(decoding.source), _contents(decoding.adapter)]),
        "training": _training(decoding),
    }
    how["rows"] = {language: len(of.ids) for language, of in sorted(tests.items())}
    how["tests"] = {language: digest(of.rows) for language, of in sorted(tests.items())}
    path = folder / "evaluation.json"
    if path.exists():
        before = read_evaluation(folder)
        done = [language for language in before["rows"] if prediction_file(folder, language).exists()]
        checked = [name for name in how if name not in ("rows", "tests", "trust_remote_code")]
        if how["precision"] == "fp32":  # where the size of a batch makes no difference but in time
            checked.remove("batch_size")
        different = [name for name in checked if how[name] != before.get(name)]
        known = before.get("tests", {})
        different += [
            f"test rows of {each}" for each in done if each in tests and known.get(each) != how["tests"][each]
        ]
        different += [f"no test rows of {each}" for each in done if each not in tests]
        if done and different:
            raise UserError(
                f"output {folder} holds predictions of another evaluation (different: {', '.join(different)}): choose "
                "another --output, or delete it"
            )
    write_whole(path, json.dumps(how, indent=2) + "\n")


def _revision(model: Model) -> str | None:
    """The commit of a hub model; None for a directory, whose files speak for it."""
    return None if Path(model.path).is_dir() else load_model_config(model)._commit_hash


def _contents(adapter: str | None) -> list[str]:
    """Digests of an adapter's files: exporting or merging it again gives the same, where nothing else has changed."""
    if adapter is None:
        return []
    try:
        files = [adapter_file(adapter, name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    except Exception as error:  # the hub raises many kinds
        raise UserError(f"adapter {adapter} cannot be fetched: {one_line(error)}") from error
    return [hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest() for file in files if file]


def _training(decoding: Decoding) -> dict[str, list[str]]:
    """Languages that the weights were trained on, as `mlalign train` and `mlalign merge` leave them beside them."""
    path = Path(decoding.adapter or decoding.model) / "mlalign.json"
    try:
        known = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return {name: known.get(name, []) for name in ("supervised", "aligned")}


# ----------------------------------------------------------------------------------------------------------- scoring


def _scored(output: Path) -> list[Path]:
    """`output`, or the directories in it, that hold predictions."""
    folders = [output, *sorted(output.glob("*/"))] if output.is_dir() else []
    found = [folder for folder in folders if (folder / "evaluation.json").exists()]
    if not found:
        raise UserError(
            f"output {output} holds no evaluation.json: --score-only scores what an earlier evaluation left"
        )
    return found


def _report(settings: Settings, task: ModuleType, folder: Path) -> dict:
    """Read the predictions back, score them, write and show the report; on every rank."""
    made = None
    with distributed.on_main():
        if distributed.is_main():
            made = _made_report(settings, task, folder)
            try:
                report.write(made, folder)
            except OSError as error:
                raise UserError(f"output {folder} cannot be written: {error.strerror or error}") from error
            if not settings.quiet:
                report.print_report(made)
                say(f"report in {folder / 'report.md'} and {folder / 'report.json'}")
    return distributed.broadcast_object(made)


def _made_report(settings: Settings, task: ModuleType, folder: Path) -> dict:
    evaluation = read_evaluation(folder)
    if evaluation["task"] != settings.task:
        raise UserError(f"{folder} holds predictions for task {evaluation['task']}, not {settings.task}")
    predictions = {name: read_predictions(folder, name, rows) for name, rows in evaluation["rows"].items()}
    counts = {name: statistics(task, each, name, folder) for name, each in predictions.items()}
    if settings.comet is not None:
        if settings.task != "translation":
            raise UserError(f"comet scores translations, and the task is {settings.task}")
        for name, each in predictions.items():
            counts[name]["comet"] = comet_scores(each, settings.comet, folder / "comet" / f"{name}.json")
    training = {
        name: getattr(settings, name)
        if getattr(settings, name) is not None
        else evaluation.get("training", {}).get(name, [])
        for name in ("supervised", "aligned")
    }
    about = {name: evaluation.get(name) for name in ("task", "model", "adapter")}
    return report.build(task, predictions, counts, about, training, settings.seed)
