"""From rows to padded batches: check, tokenise, mask, truncate, collate.

A row is one JSON object. Task rows hold `messages` (rendered by the model's chat template, the assistant's turns are
learned) or `prompt` and `completion` (plain text, the completion is learned). Bitext rows hold `src`, `tgt`,
`src_lang`, `tgt_lang` and perhaps `id`, or the hub's `translation`. `columns` of a source renames other fields.
Every mistake is a `UserError` that names file and line; what is cut or dropped is counted in `Counts`.

`mlalign inspect CONFIG` shows what comes out.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mlalign.config import Source
from mlalign.errors import UserError
from mlalign.loss import IGNORED
from mlalign.rows import Row, read_rows

UNKNOWN = "?"  #: the language of a task row that does not say it
TASK_FIELDS = ("messages", "prompt", "completion", "lang", "id")
BITEXT_FIELDS = ("src", "tgt", "src_lang", "tgt_lang", "translation", "id")


@dataclass(frozen=True, slots=True)
class TaskExample:
    """One tokenised task row."""

    ids: list[int]
    labels: list[int]  #: as `ids`, with `IGNORED` where a token is not learned
    learned: int  #: learned tokens; the first token is never predicted
    language: str

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Pair:
    """One tokenised bitext row."""

    src: list[int]
    tgt: list[int]
    languages: tuple[str, str]  #: of src and tgt
    keys: tuple[int, int, int]  #: hashes of src, tgt and id (0 = no id), see `loss.same_text`

    @property
    def language(self) -> str:
        """The language pair, by which bitext is balanced and reported."""
        return "-".join(self.languages)

    def __len__(self) -> int:
        return len(self.src) + len(self.tgt)


@dataclass
class Counts:
    """What happened to the rows of one objective."""

    rows: int = 0  #: kept
    tokens: int = 0  #: kept
    truncated: int = 0  #: kept, but cut at max_length
    dropped: dict[str, int] = field(default_factory=dict)  #: reason -> rows
    masked_turns: int = 0  #: assistant turns that the chat template renders differently in context, not learned
    languages: dict[str, int] = field(default_factory=dict)  #: rows by language, or by language pair
    sides: set[str] = field(default_factory=set)  #: languages of bitext

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def keep(self, example: TaskExample | Pair, truncated: bool) -> None:
        self.rows += 1
        self.tokens += len(example)
        self.truncated += truncated
        self.languages[example.language] = self.languages.get(example.language, 0) + 1
        if isinstance(example, Pair):
            self.sides.update(example.languages)

    def __str__(self) -> str:
        """One line for the console."""
        if not (self.rows or self.dropped):
            return "nothing read yet (streaming)"
        parts = [f"{self.rows:,} rows, {self.tokens:,} tokens, {len(self.languages)} languages"]
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated")
        parts += [f"{count:,} dropped ({reason})" for reason, count in self.dropped.items()]
        if self.masked_turns:
            parts.append(f"{self.masked_turns:,} earlier assistant turns not learned")
        return ", ".join(parts)


# ------------------------------------------------------------------------------------------------------- tokenising


def examples(
    sources: list[Source],
    fields: tuple[str, ...],
    encode: Callable[[Row, str, Source, Counts], TaskExample | Pair | None],
    counts: Counts,
) -> Iterator[TaskExample] | Iterator[Pair]:
    """Read, rename and encode all rows of `sources`, lazily and in order; `counts` is filled on the way.

    Raises UserError where a source holds no rows or a column map names a field we do not have.
    """
    for source in sources:
        unknown = [ours for ours in source.columns if ours not in fields]
        if unknown:
            raise UserError(f"columns of {source.path}: {unknown[0]!r} is none of {', '.join(fields)}")
        empty = True
        for where, row in read_rows(source):
            empty = False
            example = encode(_renamed(row, source.columns, where), where, source, counts)
            if example is not None:
                yield example
        if empty:
            raise UserError(f"{source.path} holds no rows")


def _renamed(row: Row, columns: dict[str, str], where: str) -> Row:
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise UserError(f"{where}: no column {missing[0]!r}, found {', '.join(map(repr, row))}")
    if not {"prompt", "completion"}.isdisjoint(columns) and "messages" not in columns:
        row = {name: value for name, value in row.items() if name != "messages"}  # the mapped fields are meant
    return row | {ours: row[theirs] for ours, theirs in columns.items()}


def load_task(sources: list[Source], tokenizer: PreTrainedTokenizerBase, max_length: int, counts: Counts):
    """Task rows as a lazy iterator of `TaskExample`."""
    special = _special_ids(tokenizer)

    def encode(row: Row, where: str, source: Source, counts: Counts) -> TaskExample | None:
        ids, labels, masked = _encode_task(row, where, tokenizer, special)
        counts.masked_turns += masked
        truncated = len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        learned = sum(label != IGNORED for label in labels[1:])
        if not learned:
            counts.drop("nothing left to learn after truncation")
            return None
        language = row.get("lang") or source.language or UNKNOWN
        example = TaskExample(ids, labels, learned, str(language))
        counts.keep(example, truncated)
        return example

    return examples(sources, TASK_FIELDS, encode, counts)


def load_bitext(sources: list[Source], tokenizer: PreTrainedTokenizerBase, max_length: int, counts: Counts):
    """Bitext rows as a lazy iterator of `Pair`."""

    def encode(row: Row, where: str, source: Source, counts: Counts) -> Pair | None:
        src, tgt, languages = bitext_fields(row, where)
        if not src.strip() or not tgt.strip():
            counts.drop("an empty side")
            return None
        sides = [encode_text(text, tokenizer) for text in (src, tgt)]
        truncated = any(len(side) > max_length for side in sides)
        row_id = row.get("id")
        keys = (text_hash(src), text_hash(tgt), 0 if row_id is None else text_hash(str(row_id)))
        pair = Pair(sides[0][:max_length], sides[1][:max_length], languages, keys)
        counts.keep(pair, truncated)
        return pair

    return examples(sources, BITEXT_FIELDS, encode, counts)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of plain text, with one BOS where the model's tokenizer is used to one."""
    return _with_bos(tokenizer.encode(text, add_special_tokens=False, verbose=False), tokenizer)


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


def _encode_task(
    row: Row, where: str, tokenizer: PreTrainedTokenizerBase, special: set[int]
) -> tuple[list[int], list[int], int]:
    """Ids, labels, and the number of assistant turns that had to be left unlearned."""
    text, spans, masked = _render_task(row, where, tokenizer)
    pieces = _split_tokens(text, [edge for span in spans for edge in span], tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    for number, piece in enumerate(pieces):
        learned = number % 2 == 1  # the pieces alternate: context, answer, context, ..., answer, rest
        ids += piece
        labels += piece if learned else [IGNORED] * len(piece)
    if not pieces[-1] and not _ends_a_turn(pieces[-2], tokenizer, special):
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    with_bos = _with_bos(ids, tokenizer)
    return with_bos, [IGNORED] * (len(with_bos) - len(ids)) + labels, masked


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

    def render(turns: list[dict], **kwargs) -> str:
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, **kwargs) if turns else ""
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{where}: the chat template refuses these messages: {error}") from error

    try:
        text = render(messages)
    except UserError:
        messages = _without_system(messages)  # Gemma's template, for one, knows no system
        text = render(messages)
    spans = []
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    for i in answers:
        before, end = render(messages[:i]), render(messages[: i + 1])
        start = _common_prefix(render(messages[:i], add_generation_prompt=True), end)
        if text.startswith(end) and len(before) <= start < len(end):
            spans.append((start, len(end)))
    if not spans:
        raise UserError(f"{where}: `messages` has no assistant turn to learn")
    return text, spans, len(answers) - len(spans)


def _without_system(messages: list[dict]) -> list[dict]:
    """The system's words put before the user's first, as makers of models without a system turn advise."""
    if [turn["role"] for turn in messages[:2]] != ["system", "user"]:
        return messages
    system, user, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _common_prefix(a: str, b: str) -> int:
    """Number of leading characters that agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _split_tokens(text: str, edges: list[int], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of `text`, cut at character positions `edges`: len(edges) + 1 lists.

    Tokens of the whole text are kept where the text before an edge tokenises to a prefix of them. Where a token would
    span an edge, the parts are tokenised apart, as they are at generation.
    """
    whole = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    cuts = [0]
    for edge in edges:
        prefix = tokenizer.encode(text[:edge], add_special_tokens=False, verbose=False)
        if whole[: len(prefix)] != prefix:
            borders = [0, *edges, len(text)]
            parts = [text[a:b] for a, b in pairwise(borders)]
            return [tokenizer.encode(part, add_special_tokens=False, verbose=False) for part in parts]
        cuts.append(len(prefix))
    cuts.append(len(whole))
    return [whole[a:b] for a, b in pairwise(cuts)]


def _with_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bos = tokenizer.bos_token_id
    wanted = bos is not None and tokenizer.encode("a")[:1] == [bos]
    return [bos, *ids] if wanted and ids[:1] != [bos] else ids


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
    return row["src"], row["tgt"], (row["src_lang"], row["tgt_lang"])


# --------------------------------------------------------------------------------------------------------- collating


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A valid id for positions that the attention mask hides and no label covers."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def _padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def collate_ids(rows: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids` and `attention_mask`, each [rows, tokens]."""
    mask = _padded([[1] * len(row) for row in rows], 0)
    return {"input_ids": _padded(rows, pad), "attention_mask": mask}


def collate_task(batch: list[TaskExample], pad: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, [rows, tokens], and for each learned token, [learned]: `targets`, its id, and
    `positions`, where in the flattened rows the state is that predicts it. None of it depends on the padding id."""
    inputs = collate_ids([example.ids for example in batch], pad)
    predicted = _padded([example.labels[1:] for example in batch], IGNORED)
    row, column = (predicted != IGNORED).nonzero(as_tuple=True)
    positions = row * inputs["input_ids"].shape[1] + column
    return inputs | {"positions": positions, "targets": predicted[row, column]}


def collate_bitext(batch: list[Pair], pad: int, one_pass: bool) -> list[dict[str, torch.Tensor]]:
    """The passes that encode both sides: one of [2 * pairs, tokens], src first, or two of [pairs, tokens]."""
    src, tgt = [pair.src for pair in batch], [pair.tgt for pair in batch]
    return [collate_ids(side, pad) for side in ([src + tgt] if one_pass else [src, tgt])]


def pair_keys(batch: list[Pair]) -> torch.Tensor:
    """[pairs, 3], int64: see `Pair.keys`."""
    return torch.tensor([pair.keys for pair in batch], dtype=torch.int64)


def prefers_one_pass(shares: Iterable[list[Pair]]) -> bool:
    """Whether both sides are better encoded in one padded pass than in two.

    One pass pads both sides to the longer one; it is worth up to a tenth more tokens, because it starts half as many
    kernels. `shares` are the micro-batches of all ranks, so that every rank decides alike.
    """
    one = two = 0
    for share in shares:
        src, tgt = max(len(pair.src) for pair in share), max(len(pair.tgt) for pair in share)
        one += 2 * len(share) * max(src, tgt)
        two += len(share) * (src + tgt)
    return one <= 1.1 * two
