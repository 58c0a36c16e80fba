"""From rows to examples: check, tokenise, mask, truncate.

A row is one JSON object. Task rows hold `messages` (rendered by the model's chat template, the assistant's turns are
learned, but for a first one) or `prompt` and `completion` (plain text, the completion is learned). Bitext rows hold
`src`, `tgt`, `src_lang`, `tgt_lang` and perhaps `id`, or the hub's `translation`. `columns` of a source renames other
fields.
Every mistake is a `UserError` that names file and line; what is cut or dropped is counted in `Counts`.

`mlalign inspect CONFIG` shows what comes out.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import pairwise, repeat
from typing import Any, NamedTuple, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mlalign.config import Source
from mlalign.errors import UserError
from mlalign.examples import Counts, Pair, TaskExample
from mlalign.hostile import checked_name
from mlalign.loss import IGNORED
from mlalign.rows import Row, is_local, read_rows, row_id

UNKNOWN = "?"  #: the language of a task row that does not say it
TASK_FIELDS = ("messages", "prompt", "completion", "lang", "id")
BITEXT_FIELDS = ("src", "tgt", "src_lang", "tgt_lang", "translation", "id")
_TOGETHER = 2**18  #: characters that are encoded in one call

Encode = Callable[[str], list[int]]
Given = TypeVar("Given")


class _Rendered(NamedTuple):
    """A task row as text."""

    text: str
    edges: list[int]  #: characters where a learned part begins or ends, in turn
    masked: int  #: assistant turns that had to be left unlearned
    language: str


# ------------------------------------------------------------------------------------------------------- tokenising


def _rows(sources: list[Source], fields: tuple[str, ...], streaming: bool) -> Iterator[tuple[Row, str, Source]]:
    """All rows of `sources`, read and renamed, lazily and in order, with file:line for error messages.

    Raises UserError where a source holds no rows or a column map names a field we do not have.
    """
    for source in sources:
        unknown = [ours for ours in source.columns if ours not in fields]
        if unknown:
            raise UserError(f"columns of {source.path}: {unknown[0]!r} is not one of {', '.join(fields)}")
        empty = True
        for where, row in read_rows(source, streaming):
            empty = False
            yield _renamed(row, source.columns, where), where, source
        if empty:
            raise UserError(f"{source.path} holds no rows")


def _renamed(row: Row, columns: dict[str, str], where: str) -> Row:
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise UserError(f"{where}: no column {missing[0]!r}, found {', '.join(map(repr, row))}")
    mapped = {ours: row[theirs] for ours, theirs in columns.items()}
    for whole, parts in (("messages", {"prompt", "completion"}), ("translation", {"src", "tgt"})):
        if whole not in mapped and not parts.isdisjoint(mapped):  # the mapped fields are meant
            row = {name: value for name, value in row.items() if name != whole}
    return row | mapped


def load_task(
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    counts: Counts,
    streaming: bool = False,
) -> Iterator[TaskExample]:
    """Task rows, lazily and in order; `counts` is filled as they are taken. `streaming`: see `rows.read_rows`."""
    special, bos = _special_ids(tokenizer), _leading_bos(tokenizer)

    def render(row: Row, where: str, source: Source) -> _Rendered:
        text, spans, masked = _render_task(row, where, tokenizer)
        language = row.get("lang") or source.language or UNKNOWN
        language = checked_name(str(language), where)
        return _Rendered(text, [edge for span in spans for edge in span], masked, language)

    rendered = (render(*each) for each in _rows(sources, TASK_FIELDS, streaming))
    for row, encode in _encoded(rendered, lambda row: [row.text, *(row.text[:edge] for edge in row.edges)], tokenizer):
        ids, labels = _ids_and_labels(row, encode, bos, tokenizer, special)
        counts.masked_turns += row.masked
        truncated = len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        learned = sum(label != IGNORED for label in labels[1:])
        if not learned:
            counts.drop("nothing left to learn after truncation")
            continue
        example = TaskExample(ids, labels, learned, row.language)
        counts.keep(example, truncated)
        yield example


def load_bitext(
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    counts: Counts,
    streaming: bool = False,
) -> Iterator[Pair]:
    """Bitext rows, lazily and in order; `counts` is filled as they are taken. `streaming`: see `rows.read_rows`."""
    bos = _leading_bos(tokenizer)
    rows = (
        (*bitext_fields(row, where), _own_id(row, source))
        for row, where, source in _rows(sources, BITEXT_FIELDS, streaming)
    )
    for (src, tgt, languages, own_id), encode in _encoded(rows, lambda row: row[:2], tokenizer):
        if not src.strip() or not tgt.strip():
            counts.drop("an empty side")
            continue
        sides = [_with_bos(encode(text), bos) for text in (src, tgt)]
        truncated = any(len(side) > max_length for side in sides)
        keys = (text_hash(src), text_hash(tgt), text_hash(own_id) if own_id else 0)
        pair = Pair(sides[0][:max_length], sides[1][:max_length], languages, keys)
        counts.keep(pair, truncated)
        yield pair


def _own_id(row: Row, source: Source) -> str | None:
    """`row_id`, within its source: each dataset of the hub numbers its own rows."""
    own = row_id(row)
    return own if own is None or is_local(source.path) else f"{source.path} {source.subset} {own}"


def _encoded(
    rows: Iterable[Given], texts: Callable[[Given], Iterable[str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Given, Encode]]:
    """Each row with a function from text to token ids, which has the row's `texts` ready.

    Many rows are read before the first is given, and their texts encoded in one call: a fast tokenizer spreads it over
    all cores.
    """
    block: list[Given] = []
    wanted: dict[str, None] = {}  # in order, and each once
    characters = 0
    for row in rows:
        block.append(row)
        for text in texts(row):
            wanted[text] = None
            characters += len(text)
        if characters > _TOGETHER:
            yield from zip(block, repeat(_lookup(list(wanted), tokenizer)))
            block, wanted, characters = [], {}, 0
    yield from zip(block, repeat(_lookup(list(wanted), tokenizer)))


def _lookup(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Token ids by text: of `texts` all at once and now, of any other when it is asked for."""
    known = dict(zip(texts, _plain_ids(texts, tokenizer)))
    return lambda text: known[text] if text in known else _plain_ids([text], tokenizer)[0]


def _plain_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text without what the tokenizer adds around it."""
    settings = {"add_special_tokens": False, "verbose": False}
    if tokenizer.is_fast and texts:
        return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, **settings)["input_ids"]
    return [tokenizer.encode(text, **settings) for text in texts]


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of plain text, with one BOS where the model's tokenizer is used to one."""
    return _with_bos(_plain_ids([text], tokenizer)[0], _leading_bos(tokenizer))


def encode_prompt(row: Row, where: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of what stands before a task row's answer: what a model is given at generation."""
    text, spans, _ = _render_task(row, where, tokenizer)
    return encode_text(text[: spans[-1][0]], tokenizer)


def answer_text(row: Row, where: str) -> str:
    """The answer of a task row as it was written: what a prediction is scored against."""
    if "messages" not in row and isinstance(row["completion"], str):
        return row["completion"].strip()
    name = "messages" if "messages" in row else "completion"
    last = _messages(row[name], name, where)[-1]
    if last["role"] != "assistant":
        raise UserError(
            f"{where}: the last of {name!r} is by {last['role']!r}, but an assistant's answer is to be scored"
        )
    return last["content"].strip()


def text_hash(text: str) -> int:
    """64-bit identity of a sentence up to case and spacing; never 0."""
    normal = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "big", signed=True) or 1


def _ids_and_labels(
    row: _Rendered, encode: Encode, bos: list[int], tokenizer: PreTrainedTokenizerBase, special: set[int]
) -> tuple[list[int], list[int]]:
    pieces = _split_tokens(row.text, row.edges, encode)
    ids: list[int] = []
    labels: list[int] = []
    for number, piece in enumerate(pieces):
        learned = number % 2 == 1  # the pieces alternate: context, answer, context, ..., answer, rest
        ids += piece
        labels += piece if learned else [IGNORED] * len(piece)
    if not pieces[-1] and not _ends_a_turn(pieces[-2], tokenizer, special):
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    with_bos = _with_bos(ids, bos)
    return with_bos, [IGNORED] * (len(with_bos) - len(ids)) + labels


def _ends_a_turn(answer: list[int], tokenizer: PreTrainedTokenizerBase, special: set[int]) -> bool:
    """Whether the last token that is more than white space is a special one."""
    visible = (token for token in reversed(answer) if tokenizer.decode([token]).strip())
    return next(visible, None) in special


def _render_task(row: Row, where: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]], int]:
    """The whole text, the character spans that are learned, and how many assistant turns are not."""
    if "messages" in row:
        return _render_messages(_messages(row["messages"], "messages", where), where, tokenizer)
    for name in ("prompt", "completion"):
        if row.get(name) is None:
            raise UserError(
                f"{where}: no field {name!r}: a task row needs `messages`, or `prompt` and `completion` "
                f"(found {', '.join(map(repr, row)) or 'nothing'}; `columns` renames)"
            )
    prompt, completion = row["prompt"], row["completion"]
    for name in ("prompt", "completion"):
        if not isinstance(row[name], str | list):
            raise UserError(f"{where}: {name!r} is {row[name]!r}, expected text or a list of messages")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion, [(len(prompt), len(prompt) + len(completion))], 0
    turns = _messages(prompt, "prompt", where) + _messages(completion, "completion", where)
    return _render_messages(turns, where, tokenizer)


def _messages(value: Any, name: str, where: str) -> list[dict]:
    good = (
        isinstance(value, list)
        and value
        and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value
        )
    )
    if not good:
        raise UserError(f"{where}: {name!r} must be a list of {{role, content}} objects with text in both")
    return value


def _render_messages(
    messages: list[dict], where: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]], int]:
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: the row has `messages`, but the model's tokenizer has no chat template: give `prompt` and "
            "`completion`, or use a chat model"
        )

    for number, turn in enumerate(messages, 1):
        for name in ("role", "content"):
            if forged := _special_tokens(tokenizer).search(turn[name]):
                raise UserError(
                    f"{where}: the {name} of message {number} holds {forged[0]!r}, a special token of the model, with "
                    "which it could pass for several turns: take it out"
                )

    def render(turns: list[dict], **kwargs) -> str:
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, **kwargs) if turns else ""
        except (TemplateError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
            raise UserError(f"{where}: the chat template refuses these messages: {error}") from error

    try:
        text = render(messages)
    except UserError:
        messages = _without_system(messages)  # Gemma's template, for one, knows no system
        text = render(messages)
    spans = []
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    for i in answers:
        before, end = render(messages[:i]), render(messages[: i + 1]) if i + 1 < len(messages) else text
        start = _common_prefix(render(messages[:i], add_generation_prompt=True), end)
        # At the very beginning nothing tells what the template puts there by itself from the answer.
        if i > 0 and text.startswith(end) and len(before) <= start < len(end):
            spans.append((start, len(end)))
    if not spans:
        raise UserError(f"{where}: `messages` has no assistant turn to learn (one that comes first is not learned)")
    return text, spans, len(answers) - len(spans)


@lru_cache(maxsize=2)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """Finds what the tokenizer would take for a special token."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    known = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, known)) or r"(?!)")


def _without_system(messages: list[dict]) -> list[dict]:
    """The system's words put before the user's first, as makers of models without a system turn advise."""
    if [turn["role"] for turn in messages[:2]] != ["system", "user"]:
        return messages
    system, user, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _common_prefix(a: str, b: str) -> int:
    """Number of leading characters that agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _split_tokens(text: str, edges: list[int], encode: Encode) -> list[list[int]]:
    """Token ids of `text`, cut at character positions `edges`: len(edges) + 1 lists.

    Tokens of the whole text are kept where the text before an edge tokenises to a prefix of them. Where a token would
    span an edge, the parts are tokenised apart, as they are at generation.
    """
    whole = encode(text)
    cuts = [0]
    for edge in edges:
        prefix = encode(text[:edge])
        if whole[: len(prefix)] != prefix:
            return [encode(text[a:b]) for a, b in pairwise([0, *edges, len(text)])]
        cuts.append(len(prefix))
    cuts.append(len(whole))
    return [whole[a:b] for a, b in pairwise(cuts)]


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that the tokenizer is used to put in front, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []


def _with_bos(ids: list[int], bos: list[int]) -> list[int]:
    return ids if ids[: len(bos)] == bos else bos + ids


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that can end a turn: special tokens such as EOS or a template's end-of-turn mark."""
    if tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer has no EOS token, so an answer could never learn to end")
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def bitext_fields(row: Row, where: str) -> tuple[str, str, tuple[str, str]]:
    """Source, target and their languages. Raises UserError for a row that lacks one of them."""
    if isinstance(row.get("translation"), dict):
        sides = {language: text for language, text in row["translation"].items() if text is not None}
        if len(sides) != 2:
            raise UserError(f"{where}: `translation` must hold two languages, found {', '.join(sides) or 'none'}")
        (src_lang, src), (tgt_lang, tgt) = sides.items()
        row = {"src": src, "tgt": tgt, "src_lang": src_lang, "tgt_lang": tgt_lang}
    for name in ("src", "tgt", "src_lang", "tgt_lang"):
        if not isinstance(row.get(name), str):
            raise UserError(
                f"{where}: no text in field {name!r}: a bitext row needs src, tgt, src_lang and tgt_lang "
                f"(found {', '.join(map(repr, row)) or 'nothing'}; `columns` renames)"
            )
    languages = checked_name(row["src_lang"], where), checked_name(row["tgt_lang"], where)
    return row["src"], row["tgt"], languages
