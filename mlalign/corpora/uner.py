"""Universal NER (Mayhew et al. 2024): sentences with persons, organizations and locations, as JSON extraction rows.

Read from a directory, at any depth, of the published `<lang>_<treebank>-ud-<split>.iob2`; from one of
`<lang>.<split>.jsonl` with rows of `text` and `entities` ({type, text} in order); or from the hub, one configuration
per treebank, `<lang>_<treebank>`, with rows of the same or of `text`, `tokens` and `ner_tags`.

An entity is written as it stands in the text. The tags OTH and O with a prefix, aids of the annotators, are read as O.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from mlalign.corpora.item import (
    Item,
    check_language,
    hub_configurations,
    hub_rows,
    lines,
    open_plain,
    refuse_twice,
    refuse_unknown,
    text_field,
)
from mlalign.errors import UserError
from mlalign.rows import Row, is_local, read_file, row_id
from mlalign.tasks.json_extraction import row as task_row

_TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")  # in the order of the hub's numbers
_NO_ENTITY = ("OTH", "O")
_PUBLISHED = re.compile(r"(([a-z]{2,3})_\w+)-ud-(train|dev|test)\.iob2")
_ROWS = re.compile(r"(\w+)\.(train|dev|test)\.jsonl")
_TREEBANK = re.compile(r"([a-z]{2,3})_\w+")


def read(
    source: str, splits: Collection[str], languages: Collection[str] | None, form: str, notes: Counter[str]
) -> Iterator[Item]:
    """Yield the rows of `splits`. Args: form: of prompts; notes: what was read as something else.

    Raises UserError where there is no such file, or a sentence, tag or entity is not as published.
    """
    if not is_local(source):
        yield from _read_hub(source, splits, languages, form, notes)
        return
    if not Path(source).is_dir():
        raise UserError(
            f"{source} is not a directory: give one with files such as en_ewt-ud-train.iob2, en.train.jsonl"
        )
    files: list[tuple[str, str, str, Path]] = []
    for path in sorted(Path(source).rglob("*.iob2")):
        match = _PUBLISHED.fullmatch(path.name)
        if match is None:
            raise UserError(f"{path}: the name must be as published, such as en_ewt-ud-train.iob2")
        files.append((check_language(match[2], str(path)), match[3], match[1], path))
    for path in sorted(Path(source).glob("*.jsonl")):
        match = _ROWS.fullmatch(path.name)
        if match is None:
            raise UserError(f"{path}: the name must hold language and split, such as en.train.jsonl")
        files.append((check_language(match[1], str(path)), match[2], match[1], path))
    if not files:
        raise UserError(f"{source} holds no files such as en_ewt-ud-train.iob2 or en.train.jsonl")
    refuse_twice((f"{split} of {treebank}", path) for _, split, treebank, path in files)
    refuse_unknown(languages, (language for language, *_ in files), source)
    for language, split, treebank, path in files:
        if split not in splits or (languages is not None and language not in languages):
            continue
        if path.suffix == ".iob2":
            sentences = _sentences(path, f"uner-{treebank}-{split}", notes)
        else:
            sentences = _rows(read_file(path), f"uner-{treebank}-{split}", notes)
        yield from _items(sentences, split, language, form)


_Sentence = tuple[str, str, str, list[tuple[str, str]]]  # id, where, text, (type, entity) in order


def _items(sentences: Iterator[_Sentence], split: str, language: str, form: str) -> Iterator[Item]:
    for id_, where, text, entities in sentences:
        row = {"id": id_, "lang": language, **task_row(text, entities, form), "text": text}
        yield Item(split, (language,), row, (text.strip(),), where)


def _read_hub(
    source: str, splits: Collection[str], languages: Collection[str] | None, form: str, notes: Counter[str]
) -> Iterator[Item]:
    configurations = hub_configurations(source)
    treebanks = {name: match[1] for name in configurations if (match := _TREEBANK.fullmatch(name))}
    if not treebanks:
        raise UserError(f"{source} has no configuration for a treebank such as en_ewt, but {', '.join(configurations)}")
    refuse_unknown(languages, treebanks.values(), source)
    for treebank, language in treebanks.items():
        if languages is None or language in languages:
            check_language(language, f"{source} {treebank}")
            for split in splits:
                rows = ((where, row) for _, where, row in hub_rows(source, treebank, [split]))
                sentences = _rows(rows, f"uner-{treebank}-{split}", notes)
                yield from _items(sentences, split, language, form)


# ----------------------------------------------------------------------------------------------------------- sentences


def _rows(rows: Iterator[tuple[str, Row]], prefix: str, notes: Counter[str]) -> Iterator[_Sentence]:
    """Rows with `entities`, or with `tokens` and `ner_tags`. Args: prefix: of ids, where rows have none."""
    for number, (where, row) in enumerate(rows, 1):
        own_id = row_id(row) or f"{prefix}-{row.get('idx', number)}"
        text = text_field(row, "text", where, "a sentence with entities, or with tokens and ner_tags")
        if "entities" in row:
            yield own_id, where, text, _given(row["entities"], text, where)
        elif isinstance(row.get("tokens"), list) and isinstance(row.get("ner_tags"), list):
            tags = [_tag(tag, where, notes) for tag in row["ner_tags"]]
            yield own_id, where, *_located(text, row["tokens"], tags, where, notes)
        else:
            raise UserError(f"{where}: no `entities`, and no lists `tokens` and `ner_tags`")


def _given(entities: Any, text: str, where: str) -> list[tuple[str, str]]:
    try:
        pairs = [(entity["type"], entity["text"]) for entity in entities]
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: entities must be a list of objects with type and text") from error
    strange = next((pair for pair in pairs if pair[1] not in text), None)
    if strange is not None:
        raise UserError(f"{where}: the entity {strange[1]!r} is not in the text")
    return pairs


def _sentences(path: Path, prefix: str, notes: Counter[str]) -> Iterator[_Sentence]:
    """Of an .iob2 file: comments, then a line for each token (number, token, tag, ...), then an empty line."""
    comments: dict[str, str] = {}
    tokens: list[str] = []
    tags: list[str] = []
    start, number = f"{path}:1", 0

    def sentence() -> _Sentence:
        if "text" not in comments:
            raise UserError(f"{start}: the sentence has no line `# text = ...`")
        id_ = f"{prefix}-{comments.get('sent_id', number)}"
        return id_, start, *_located(comments["text"], tokens, tags, start, notes)

    with open_plain(path) as file:
        for where, line in lines(file, path):
            if line.startswith("#"):
                start = start if comments else where
                name, _, value = line.removeprefix("#").partition("=")
                comments[name.strip()] = value.strip()
            elif line:
                columns = line.split("\t")
                if len(columns) < 3 or not columns[0].isdecimal():
                    raise UserError(f"{where}: expected number, token and tag with tabs between, found {line[:80]!r}")
                tokens.append(columns[1])
                tags.append(_tag(columns[2], where, notes))
            elif tokens:
                number += 1
                yield sentence()
                comments, tokens, tags = {}, [], []
    if tokens:
        number += 1
        yield sentence()


def _tag(tag: Any, where: str, notes: Counter[str]) -> str:
    if isinstance(tag, int) and 0 <= tag < len(_TAGS):
        return _TAGS[tag]
    if tag in _TAGS:
        return tag
    prefix, _, kind = str(tag).partition("-")
    if prefix in ("B", "I") and kind in _NO_ENTITY:
        notes[f"tags {tag} read as O"] += 1
        return "O"
    raise UserError(f"{where}: the tag is {tag!r}, expected one of {', '.join(_TAGS)}")


def _located(
    text: str, tokens: list[str], tags: list[str], where: str, notes: Counter[str]
) -> tuple[str, list[tuple[str, str]]]:
    """The text and its entities as they stand in it.

    A text that is not its tokens with or without spaces, for one of them stands for a contraction, is replaced by them.
    """
    if len(tokens) != len(tags):
        raise UserError(f"{where}: {len(tokens)} tokens, but {len(tags)} tags")
    ends = _ends(text, tokens)
    if ends is None:
        notes["texts that do not hold their tokens, replaced by the tokens with spaces"] += 1
        text = " ".join(tokens)
        ends = _ends(text, tokens) or []
    entities: list[tuple[str, int, int]] = []
    before = "O"
    for token, tag, end in zip(tokens, tags, ends):
        prefix, _, kind = tag.partition("-")
        if prefix == "I" and before[2:] == kind:
            entities[-1] = (kind, entities[-1][1], end)
        elif kind:
            if prefix == "I":
                notes["tags I- that follow no entity of their type, read as B-"] += 1
            entities.append((kind, end - len(token), end))
        before = tag
    return text, [(kind, text[first:last]) for kind, first, last in entities]


def _ends(text: str, tokens: list[str]) -> list[int] | None:
    """Where each token ends in the text; None where there is more between them than white space."""
    ends, end = [], 0
    for token in tokens:
        start = text.find(token, end)
        if start < 0 or text[end:start].strip():
            return None
        end = start + len(token)
        ends.append(end)
    return None if text[end:].strip() else ends
