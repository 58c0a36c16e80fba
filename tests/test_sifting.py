"""Normal forms, hashes and sets of hashes, against plain Python that holds the texts themselves."""

import random
import unicodedata
from itertools import pairwise

import numpy as np
import pytest

from mlalign.sifting import EXACT, NORMALISED, NOT, Seen, Sentences, hashes, normalise, ranks, smallest, tags, together

SAME = [
    ("Hello, world!", "hello world"),
    ("Hello  world", "HELLO\tWORLD\u00a0"),
    ("ﬁne", "Fine"),  # a ligature
    ("ＡＢＣ１", "abc1"),  # noqa: RUF001 full width
    ("Straße", "STRASSE"),
    ("e\u0301te\u0301", "été"),  # composed and not
    ("「こんにちは」。", "こんにちは"),
    ("a\u200db\ufeff", "ab"),
    ("two\nlines", "Two lines"),
]
DIFFERENT = [("?!", "..."), ("हिंदी", "हद"), ("été", "ete"), ("1+1", "1=1"), ("a", ""), ("Wörter", "Worter")]


def naive(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = [c for c in folded if unicodedata.category(c)[0] not in "PZ" and unicodedata.category(c) not in ("Cc", "Cf")]
    return "".join(kept) or text.strip()


def test_normal_forms():
    for one, other in SAME:
        assert normalise([one]) == normalise([other]), (one, other)
    for one, other in DIFFERENT:
        assert normalise([one]) != normalise([other]), (one, other)
    assert normalise([]) == []
    assert normalise(["", " \n\t", "\u3000"]) == ["", "", ""]


def test_normal_forms_of_many_at_once_are_those_of_each():
    chance = random.Random(0)
    points = [*range(32, 1500), *range(0x900, 0xE80), *range(0x3000, 0x3400), *range(0xFB00, 0xFF00), 10, 0x1F600]
    texts = ["".join(map(chr, chance.choices(points, k=chance.randrange(20)))) for _ in range(3000)]
    texts = [text for text in texts if not any(0xD800 <= ord(c) < 0xE000 for c in text)]
    assert normalise(texts) == [naive(text) for text in texts]


def test_a_hash_of_a_row_knows_the_order_of_its_sides():
    one, other = hashes(["a", "b", "a"]), hashes(["b", "a", "b"])
    keys = together([one, other])
    assert keys[0] == keys[2] != keys[1]
    assert together([one]) is one
    assert len(hashes([])) == 0


@pytest.mark.parametrize("size", [1, 7, 100])
def test_seen_finds_what_a_dictionary_finds(size):
    chance = random.Random(size)
    rows = [(f"{chance.randrange(400)}".rjust(chance.randrange(8)),) for _ in range(3000)]
    seen, first = Seen(), {}
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        new, exact = seen.add(hashes(normalise([text for (text,) in batch])), tags(batch))
        for (text,), is_new, is_exact in zip(batch, new, exact):
            form = text.strip()
            assert is_new == (form not in first)
            assert is_exact == (first.get(form) == text)
            first.setdefault(form, text)
    lengths = [len(keys) for keys, _ in seen._runs]
    assert sum(lengths) == len(first)
    assert all(longer >= 2 * shorter for longer, shorter in pairwise(lengths))


def test_sentences_by_language_and_for_all():
    known = Sentences()

    def add(language, texts):
        known.add(language, hashes(normalise(texts)), hashes(texts))

    def find(language, texts):
        return known.find(language, hashes(normalise(texts)), texts).tolist()

    assert find("en", ["Yes."]) == [NOT]
    add("en", ["Yes.", "No."])
    add(None, ["Maybe"])
    assert find("en", ["Yes.", "yes", "Maybe", "no.", "No."]) == [EXACT, NORMALISED, NOT, NORMALISED, EXACT]
    add("en", ["maybe"])
    assert find("en", ["Maybe", "yes"]) == [NORMALISED, NORMALISED]
    assert find("de", ["Yes."]) == [NOT]
    assert find(None, ["Maybe", "Yes."]) == [EXACT, NOT]


def test_the_smallest_are_exactly_so_many():
    values = np.array([5, 1, 3, 1, 9, 3], dtype=np.uint64)
    assert smallest(values, 3).tolist() == [False, True, True, True, False, False]
    assert smallest(values, 4).tolist() == [False, True, True, True, False, True]
    assert smallest(values, 0).sum() == 0
    assert smallest(values, 6).all() and smallest(values, 7).all()
    many = ranks([str(i) for i in range(10_000)], seed=0)
    for column in (0, 1):
        chosen = smallest(many[:, column], 5000)
        assert chosen.sum() == 5000
        assert abs(chosen[:5000].sum() - 2500) < 200  # no order of ids is preferred
    assert (smallest(many[:, 0], 5000) & smallest(many[:, 1], 5000)).sum() < 2700  # the columns have nothing in common
    assert (ranks(["a", "b"], 0) == ranks(["b", "a"], 0)[::-1]).all()
    assert (ranks(["a"], 0) != ranks(["a"], 1)).all()
