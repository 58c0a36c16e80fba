"""`mlalign evaluate MODEL --test 'test.*.jsonl' --output DIR`: generate answers and score them per language.

Rows are task rows as for training, each with `lang`. Writes `predictions.jsonl` and `report.json`
(`{"f1": {language: score}, "exact_match": {...}, "rows": {...}}`). Under a launcher the rows are shared out.
"""

import json
import re
from pathlib import Path

import torch
from rich.table import Table

from mlalign import distributed
from mlalign.config import Model, Source
from mlalign.data import TASK_FIELDS, answer_text, collate_ids, encode_prompt, pad_id
from mlalign.errors import UserError
from mlalign.model import load_for_inference, load_tokenizer
from mlalign.rows import read_rows
from mlalign.tasks import TASKS
from mlalign.tracker import console, say

_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)  # what reasoning models write before the answer


def evaluate(
    model: str,
    test: list[str],
    output: Path,
    adapter: str | None,
    task: str,
    batch_size: int,
    max_new_tokens: int,
    max_rows: int | None,
) -> dict[str, dict[str, float]]:
    """Score `model` (with `adapter`) on the test files; returns metric -> language -> value, on every rank."""
    if task not in TASKS:
        raise UserError(f"task {task} is none of {', '.join(TASKS)}")
    if distributed.launched():
        distributed.init()
    tokenizer = load_tokenizer(Model(path=model))
    rows = _read(test, tokenizer, max_rows)
    lm = load_for_inference(Model(path=model), adapter)
    answers = _generate(lm, tokenizer, [row["prompt_ids"] for row in rows], batch_size, max_new_tokens)
    report: dict[str, dict[str, float]] = {"rows": {}}
    for language in sorted({row["lang"] for row in rows}):
        index = [i for i, row in enumerate(rows) if row["lang"] == language]
        scores = TASKS[task].score([answers[i] for i in index], [rows[i]["reference"] for i in index])
        for metric, value in (scores | {"rows": len(index)}).items():
            report.setdefault(metric, {})[language] = value
    if distributed.is_main():
        _write(output, rows, answers, report)
        _print(report)
        say(f"report in {output / 'report.json'}")
    return report


def _read(patterns: list[str], tokenizer, max_rows: int | None) -> list[dict]:
    """All test rows, up to `max_rows` a language: lang, id, prompt_ids, reference."""
    kept: list[dict] = []
    seen: dict[str, int] = {}
    for pattern in patterns:
        for where, row in read_rows(Source(path=pattern)):
            if not isinstance(row.get("lang"), str):
                fields = ", ".join(name for name in TASK_FIELDS if name in row)
                raise UserError(f"{where}: no text in field 'lang', which the report is by (found {fields})")
            language = row["lang"]
            seen[language] = seen.get(language, 0) + 1
            if max_rows is None or seen[language] <= max_rows:
                prompt_ids = encode_prompt(row, where, tokenizer)
                reference = answer_text(row, where)
                kept.append({"lang": language, "id": row.get("id"), "prompt_ids": prompt_ids, "reference": reference})
    if not kept:
        raise UserError(f"{' '.join(patterns)} hold no rows")
    return kept


@torch.inference_mode()
def _generate(lm, tokenizer, prompts: list[list[int]], batch_size: int, max_new_tokens: int) -> list[str]:
    """Greedy answers in the order of `prompts`; each rank generates a slice, all get all."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))[distributed.rank() :: distributed.world_size()]
    ends = lm.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    pad = pad_id(tokenizer)
    answers: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        batch = _left_padded([prompts[i] for i in index], pad, distributed.device())
        tokens = lm.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(ends),
            pad_token_id=pad,
        )
        for i, row in zip(index, tokens[:, batch["input_ids"].shape[1] :].tolist()):
            answer = tokenizer.decode(_until(row, ends), skip_special_tokens=True)
            answers[i] = _THOUGHT.sub("", answer).strip()
    everything = {i: answer for part in distributed.gather_objects(answers) for i, answer in part.items()}
    return [everything[i] for i in range(len(prompts))]


def _left_padded(prompts: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Generation continues the last position of every row, so the padding stands on the left."""
    flipped = collate_ids([prompt[::-1] for prompt in prompts], pad)
    return {name: tensor.flip(1).to(device) for name, tensor in flipped.items()}


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def _write(output: Path, rows: list[dict], answers: list[str], report: dict) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with (output / "predictions.jsonl").open("w") as file:
            for row, answer in zip(rows, answers):
                line = {"lang": row["lang"], "id": row["id"], "prediction": answer, "reference": row["reference"]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror}") from error


def _print(report: dict[str, dict[str, float]]) -> None:
    metrics = [metric for metric in report if metric != "rows"]
    table = Table("language", "rows", *metrics)
    for language, count in report["rows"].items():
        table.add_row(language, str(count), *(f"{report[metric][language]:.3f}" for metric in metrics))
    console.print(table)
