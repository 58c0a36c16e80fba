"""`mlalign prepare massive INPUT OUTPUT`: MASSIVE 1.1 as task rows for slot filling.

INPUT holds `<locale>.<split>.jsonl`, or the published `<locale>.jsonl` with a `partition` field. OUTPUT gets
`<split>.<language>.jsonl` with `prompt`, `completion` (`type: value; type: value`, or `None`), `lang` and `id`.
"""

import json
import re
from pathlib import Path

from mlalign.config import Source
from mlalign.errors import UserError
from mlalign.rows import read_rows
from mlalign.tracker import say

_SLOT = re.compile(r"\[\s*(\w+)\s*:\s*(.*?)\s*\]")
_SPLITS = ("train", "dev", "test")


def prepare_massive(folder: Path, output: Path) -> None:
    """Convert every locale in `folder`. Raises UserError where there is none, or a row lacks a field."""
    paths = sorted(folder.glob("*-*.jsonl"))
    if not paths:
        raise UserError(f"{folder} holds no <locale>.jsonl or <locale>.<split>.jsonl files such as en-US.train.jsonl")
    rows: dict[tuple[str, str], list[dict]] = {}
    for path in paths:
        for where, row in read_rows(Source(path=str(path))):
            split, language, converted = _convert(row, where)
            rows.setdefault((split, language), []).append(converted)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for (split, language), converted in rows.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in converted)
            (output / f"{split}.{language}.jsonl").write_text("".join(lines))
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from error
    for split in _SPLITS:
        counts = {language: len(converted) for (s, language), converted in sorted(rows.items()) if s == split}
        say(f"{split}: {sum(counts.values()):,} rows in {len(counts)} languages ({', '.join(counts)})")


def _convert(row: dict, where: str) -> tuple[str, str, dict]:
    for name in ("id", "locale", "partition", "utt", "annot_utt"):
        if not isinstance(row.get(name), str):
            raise UserError(f"{where}: no text in field {name!r}: expected a row of MASSIVE 1.1")
    if row["partition"] not in _SPLITS:
        raise UserError(f"{where}: partition is {row['partition']!r}, expected one of {', '.join(_SPLITS)}")
    slots = [(slot["type"], slot["value"]) for slot in row["slots"]] if "slots" in row else _slots(row["annot_utt"])
    answer = "; ".join(f"{kind}: {value}" for kind, value in slots) or "None"
    language = row["locale"] if row["locale"] == "zh-TW" else row["locale"].split("-")[0]
    prompt = f"Utterance: {row['utt']}\nSlots:"
    return row["partition"], language, {"id": row["id"], "lang": language, "prompt": prompt, "completion": f" {answer}"}


def _slots(annotated: str) -> list[tuple[str, str]]:
    """`wake me at [time : nine am]` -> [("time", "nine am")]."""
    return _SLOT.findall(annotated)
