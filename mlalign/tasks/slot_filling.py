"""Slot filling: `time: nine am; date: friday`, or `None`. Micro F1 of slots as MASSIVE scores them, by seqeval.

A text answer says what a slot holds, not where it stands; so its values are placed in the utterance first, and from
there on all is as in MASSIVE's own scorer (https://github.com/alexa/massive, `training_utils.py`): labels of words, or
of characters in Japanese and Chinese, neighbours of one type being one slot, and seqeval's micro F1.
"""

import numpy as np

from mlalign.errors import UserError
from mlalign.languages import language_of
from mlalign.scoring import f1
from mlalign.tasks.prompts import task_row

MAIN = "f1"
LOWER_IS_BETTER = ("malformed",)

_INSTRUCTION = (
    "Extract the entities that a voice assistant needs to carry out the user's command. "
    "Answer with `type: value` for each entity, in order, with `; ` between them and each value in the words of the "
    "command, or with `None` if there are none."
)
_OTHER = "Other"  # MASSIVE's label of words outside all slots
_BY_CHARACTER = ("ja", "zh")  # ja-JP, zh-CN, zh-TW


def row(utterance: str, slots: list[tuple[str, str]], form: str) -> dict:
    """A task row's prompt and answer. Args: slots: (type, value) in order; form: `prompts.FORMS`."""
    answer = "; ".join(f"{kind}: {value}" for kind, value in slots) or "None"
    return task_row(form, _INSTRUCTION, f"Utterance: {utterance}\nSlots:", utterance, answer)


def gold(row: dict, answer: str, where: str) -> dict:
    """What scoring needs of a test row. Raises UserError where there is no annotated utterance."""
    annotated, language = row.get("annot_utt"), row.get("lang")
    if not isinstance(annotated, str):
        raise UserError(
            f"{where}: no text in field 'annot_utt', MASSIVE's annotated utterance, which slots are scored by "
            "(`mlalign prepare massive` writes it; answers without an utterance are scored by --task items)"
        )
    try:
        words, _ = words_and_labels(annotated, language)
    except ValueError as error:
        raise UserError(f"{where}: annot_utt is {annotated!r}: {error}") from error
    if not words:
        raise UserError(f"{where}: annot_utt is empty")
    return {"annot_utt": annotated}


def statistics(predictions: list[str], golds: list[dict], language: str) -> dict[str, np.ndarray]:
    """Counts of each row, [rows]: slots right, found and wanted; whether the answer is right, and whether malformed."""
    from seqeval.metrics.sequence_labeling import get_entities  # here: it takes a second, and `prepare` needs none

    counts = {name: np.zeros(len(golds)) for name in ("right", "found", "wanted", "exact", "malformed")}
    for number, (prediction, each) in enumerate(zip(predictions, golds, strict=True)):
        words, labels = words_and_labels(each["annot_utt"], language)
        slots, malformed = parse(prediction)
        wanted = bio(labels)
        found, beside = place(slots, words, labels, language)
        right = set(get_entities(wanted)) & set(get_entities(found))
        counts["right"][number] = len(right)
        counts["found"][number] = len(get_entities(found)) + beside
        counts["wanted"][number] = len(get_entities(wanted))
        counts["exact"][number] = found == wanted and not beside and not malformed
        counts["malformed"][number] = malformed
    return counts


def metrics(totals: dict[str, np.ndarray], rows: int | np.ndarray) -> dict[str, np.ndarray]:
    """Metrics from sums of `statistics` over rows; every value may be an array of many such sums."""
    return {
        "f1": f1(totals["right"], totals["found"], totals["wanted"]),
        "exact_match": totals["exact"] / rows,
        "malformed": totals["malformed"] / rows,
    }


def describe(language: str, golds: list[dict]) -> dict[str, str]:
    """How each metric is computed, for the report."""
    unit = "characters" if language_of(language) in _BY_CHARACTER else "words"
    return {"f1": f"seqeval micro F1 over {unit}, after MASSIVE"}


# ------------------------------------------------------------------------------------------------- words and labels


def words_and_labels(annotated: str, language: str) -> tuple[list[str], list[str]]:
    """MASSIVE's reading of an annotated utterance: `wake me at [time : nine am]` -> words, and the label of each.

    With one exception: where a slot of a Japanese or Chinese utterance ends in ASCII, as in `[device : tv] 吧`, their
    script forgets to close it and labels what follows; here it ends at its bracket.
    Raises ValueError for brackets that are not of this form.
    """
    words, labels, label, colon = [], [], _OTHER, False
    for chunk in annotated.split():
        if chunk.startswith("["):
            if label != _OTHER or len(chunk) == 1:
                raise ValueError("a slot opens inside another, or without a type")
            label, colon = chunk[1:], True
            continue
        if colon:
            if chunk != ":":
                raise ValueError(f"no colon after the type {label}")
            colon = False
            continue
        closes = chunk.endswith("]")
        if closes and label == _OTHER:
            raise ValueError("a bracket closes and none is open")
        split = split_words(chunk.removesuffix("]"), language)
        words += split
        labels += [label] * len(split)
        label = _OTHER if closes else label
    if label != _OTHER:
        raise ValueError(f"the slot {label} is not closed")
    return words, labels


def split_words(text: str, language: str) -> list[str]:
    """By white space; in Japanese and Chinese by character, but for chunks of ASCII alone."""
    chunks = text.split()
    if language_of(language) not in _BY_CHARACTER:
        return chunks
    return [word for chunk in chunks for word in ([chunk] if chunk.isascii() else chunk)]


def bio(labels: list[str]) -> list[str]:
    """`Other time time date` -> `O B-time I-time B-date`: neighbours of one type are one slot, as in MASSIVE."""
    tags, before = [], _OTHER
    for label in labels:
        tags.append("O" if label == _OTHER else f"I-{label}" if label == before else f"B-{label}")
        before = label
    return tags


def parse(answer: str) -> tuple[list[tuple[str, str]], bool]:
    """(type, value) of each item of an answer, and whether it is malformed: empty, or an item is no such pair.

    The type `Other` is none: it is what words outside all slots are labelled with.
    """
    if answer.strip().casefold().rstrip(".") == "none":
        return [], False
    slots, malformed = [], not answer.strip()
    for item in answer.strip().removesuffix(";").split(";"):
        kind, colon, value = (part.strip() for part in item.partition(":"))
        if not (kind and colon and value) or kind == _OTHER:
            malformed = True
        else:
            slots.append((kind, value))
    return slots, malformed


def place(slots: list[tuple[str, str]], words: list[str], labels: list[str], language: str) -> tuple[list[str], int]:
    """BIO tags of an answer, and the number of its slots that are not in the utterance.

    A value that stands there several times is placed where `labels`, the right ones, have it, if they do; else at the
    first place that is free: the answer did not say which.
    """
    utterance = [word.casefold() for word in words]
    placed, beside = [_OTHER] * len(words), 0
    for kind, value in slots:
        wanted = [word.casefold() for word in split_words(value, language)]
        size = len(wanted)
        free = [
            start
            for start in range(len(words) - size + 1)
            if utterance[start : start + size] == wanted and set(placed[start : start + size]) == {_OTHER}
        ]
        if not free:
            beside += 1
            continue
        start = next((s for s in free if _is_slot(labels, s, s + size, kind)), free[0])
        placed[start : start + size] = [kind] * size
    return bio(placed), beside


def _is_slot(labels: list[str], start: int, end: int, kind: str) -> bool:
    return set(labels[start:end]) == {kind}
