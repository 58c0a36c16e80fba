"""Rows, configs and positions that hypothesis makes up: refused in one sentence, or good to train on.

FUZZ=10 pytest tests/test_fuzz.py     ten times as many of each: 10,000 rows and 2,000 configs
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlalign.collate import collate_bitext, collate_task
from mlalign.config import Config, Source, load
from mlalign.data import load_bitext, load_task
from mlalign.errors import UserError
from mlalign.examples import Counts
from mlalign.loss import IGNORED
from mlalign.sampler import GlobalOrder, language_quotas, slices, streamed

TIMES = int(os.environ.get("FUZZ", "1"))
FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def many(examples: int):
    return settings(max_examples=examples * TIMES, deadline=None, derandomize=True, suppress_health_check=FIXTURES)


text = st.text(max_size=30) | st.sampled_from(
    ["", " ", "\0", "</s>", "<s>x", "\u202e", "a\u0301" * 9, "🏳️‍🌈", "x" * 3000]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
turn = (
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | text, "content": text}) | anything
)
task_row = st.fixed_dictionaries(
    {},
    optional={
        "prompt": text | anything,
        "completion": text | anything,
        "messages": st.lists(turn, max_size=4) | anything,
        "lang": st.sampled_from(["de", "en"]) | anything,
        "id": anything,
    },
)
plain_row = st.fixed_dictionaries({"prompt": text, "completion": text}, optional={"lang": text, "id": anything})
chat_row = st.fixed_dictionaries({"messages": st.lists(turn, min_size=1, max_size=4)})
code = st.sampled_from(["de", "en", "", "../x"]) | anything
bitext_row = st.fixed_dictionaries(
    {}, optional={"src": text | anything, "tgt": text | anything, "src_lang": code, "tgt_lang": code, "id": anything}
)
pair_row = st.fixed_dictionaries({"src": text, "tgt": text, "src_lang": st.just("de"), "tgt_lang": st.just("en")})
translation_row = st.fixed_dictionaries({"translation": st.dictionaries(text, text | st.none(), max_size=3) | anything})


def sentence(error: UserError) -> str:
    """Fails on a message that is no single sentence."""
    message = str(error)
    assert message.strip() and "\n" not in message and "Traceback" not in message
    return message


def read(folder: Path, row: dict, load_rows, tokenizer) -> list:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    try:
        return list(load_rows([Source(path=str(path))], tokenizer, 40, Counts()))
    except UserError as error:
        assert str(path) in sentence(error)
        return []


def train_all(configs: list[dict]) -> list[str]:
    """A run of each. Returns the sentences of those that were refused."""
    from mlalign.commands.train import train

    said = []
    for values in configs:
        try:
            train(Config.model_validate(values))
        except UserError as error:
            said.append(sentence(error))
        except Exception as error:
            raise AssertionError(f"{values}") from error
    return said


def train_on(pool, values: dict, objective: str, rows: list[dict], folder: Path) -> None:
    """An epoch of the rows, alone."""
    path = folder / "accepted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = values[objective] | {"train": str(path), "batch_size": 64, "micro_batch_size": 16, "max_length": 40}
    alone = {"task": None, "alignment": None, "interleave": {"ratio": "1:0" if objective == "task" else "0:1"}}
    optimizer = {"epochs": 1, "lr": 1e-3}
    assert pool.run(train_all, [values | alone | {objective: section, "optimizer": optimizer}], timeout=600) == [[]]


def test_any_task_row_is_refused_or_trains(ranks, settings, tmp_path, tokenizer):
    accepted: list[dict] = []

    @many(700)
    @given(row=st.one_of(plain_row, chat_row, task_row))
    def collect(row):
        for example in read(tmp_path, row, load_task, tokenizer):
            assert 0 < len(example) <= 40
            assert 0 < example.learned == sum(label != IGNORED for label in example.labels[1:])
            assert all(label in (IGNORED, token) for label, token in zip(example.labels, example.ids))
            batch = collate_task([example], 0)
            assert len(batch["targets"]) == example.learned
            assert int(batch["input_ids"].max()) < len(tokenizer)
            accepted.append(row)

    collect()
    assert len(accepted) > 100
    train_on(ranks(1), settings, "task", accepted, tmp_path)


def test_any_bitext_row_is_refused_or_trains(ranks, settings, tmp_path, tokenizer):
    accepted: list[dict] = []

    @many(300)
    @given(row=st.one_of(pair_row, translation_row, bitext_row))
    def collect(row):
        for pair in read(tmp_path, row, load_bitext, tokenizer):
            assert 0 < len(pair.src) <= 40 and 0 < len(pair.tgt) <= 40
            (batch,) = collate_bitext([pair], 0, [2])
            assert int(batch["attention_mask"].sum()) == len(pair)
            accepted.append(row)

    collect()
    assert len(accepted) > 30
    train_on(ranks(1), settings, "alignment", accepted, tmp_path)


@many(60)
@given(junk=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_file_is_refused_or_read(tmp_path, tokenizer, junk):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(junk)
    try:
        list(load_task([Source(path=str(path))], tokenizer, 40, Counts()))
    except UserError as error:
        sentence(error)


# ------------------------------------------------------------------------------------------------------------ configs


def keys_of(model: type, prefix: str = "") -> list[str]:
    """Every key of the schema, dotted."""
    found = []
    for name, field in model.model_fields.items():
        nested = [
            a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if hasattr(a, "model_fields")
        ]
        found += [prefix + name, *(key for each in nested for key in keys_of(each, f"{prefix}{name}."))]
    return found


KEYS = [key for key in keys_of(Config) if key not in ("run_dir", "model.path")]
value = st.one_of(
    st.integers(-2, 64),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.sampled_from(
        ["auto", "bf16", "fp32", "joint", "alternate", "1:0", "0:1", "3:2", "id", "local", "last", "one_way"]
    ),
    st.sampled_from(
        ["cosine", "eager", "ds_configs/zero2.json", "ds_configs/zero3.json", "${seed}", "${no.such}", "???"]
    ),
    anything,
)


def change(values: dict, changes: list[tuple[str, Any]]) -> dict:
    values = copy.deepcopy(values)
    for key, new in changes:
        *sections, last = key.split(".")
        place = values
        for name in sections:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        place[last] = new
    return values


def load_changed(path: Path, values: dict, changes: list[tuple[str, Any]]) -> Config | None:
    path.write_text(json.dumps(change(values, changes)))  # JSON is YAML
    try:
        return load(path)
    except UserError as error:
        sentence(error)
        return None


changes = st.lists(st.tuples(st.sampled_from(KEYS) | text.map(lambda key: key or "x"), value), min_size=1, max_size=3)


@many(200)
@given(changes=changes)
def test_any_config_is_refused_or_loads_and_reads_back(tmp_path, settings, changes):
    config = load_changed(tmp_path / "c.yaml", settings, changes)
    if config is not None:
        from mlalign.config import dump

        (tmp_path / "again.yaml").write_text(dump(config))
        assert load(tmp_path / "again.yaml") == config


@many(40)
@given(junk=st.text(max_size=200) | st.binary(max_size=200).map(lambda each: each.decode("latin-1")))
def test_any_text_is_refused_as_a_config(tmp_path, junk):
    (tmp_path / "c.yaml").write_text(junk)
    with pytest.raises(UserError) as caught:
        load(tmp_path / "c.yaml")
    sentence(caught.value)


def test_configs_that_load_train_a_step(ranks, settings, tmp_path):
    """Of values that a user might try: what the schema takes, the run takes, or says in a sentence why not."""
    accepted: list[dict] = []
    tries = st.integers(0, 40) | st.sampled_from([True, False, None, 0.0, 0.5, 1e-3, 1.0]) | value

    @many(300)
    @given(key=st.sampled_from(KEYS), new=tries)
    def collect(key, new):
        config = load_changed(tmp_path / "c.yaml", settings, [(key, new)])
        if config is None or (config.lora and config.lora.r > 512) or config.model.compile:
            return
        if config.optimizer.steps is not None:
            config.optimizer.steps = 1
        config.stuck_after = 600  # of a fraction of a second it would make use
        accepted.append(config.model_dump(mode="json") | {"run_dir": str(tmp_path / f"run-{len(accepted)}")})

    collect()
    assert len(accepted) > 20
    said = ranks(1).run(train_all, accepted, timeout=600)[0]
    assert len(said) < len(accepted) / 2, said


# ---------------------------------------------------------------------------------------------------------- positions


@many(60)
@given(
    rows=st.integers(1, 60),
    batch=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
    takes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    stop=st.integers(0, 5),
)
def test_an_order_goes_on_from_any_position(rows, batch, seed, takes, stop):
    def order() -> GlobalOrder:
        return GlobalOrder(streamed(lambda: iter(["x" * n for n in range(rows)]), batch, seed))

    straight, broken = order(), order()
    wanted = [straight.take(count) for count in takes]
    found = [broken.take(count) for count in takes[:stop]]
    again = order()
    again.restore(json.loads(json.dumps(broken.state())))
    assert found + [again.take(count) for count in takes[stop:]] == wanted
    whole = order().take(rows)
    assert sorted(map(len, whole)) == list(range(rows)), "an epoch holds every row once"


@many(60)
@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=40), size=st.integers(1, 9), ranks=st.integers(1, 6))
def test_every_row_of_a_batch_is_dealt_to_one_rank(lengths, size, ranks):
    dealt = slices(["x" * n for n in lengths], size, ranks)
    assert sorted(len(row) for shares in dealt for share in shares for row in share) == sorted(lengths)
    assert all(len(shares) == ranks and len(share) <= size for shares in dealt for share in shares)
    if len(lengths) % ranks == 0:
        assert all(len({len(share) for share in shares}) == 1 for shares in dealt)


@many(60)
@given(counts=st.dictionaries(st.text(min_size=1), st.integers(1, 10**9), min_size=1), temperature=st.floats(0, 1))
def test_quotas_add_up(counts, temperature):
    assert sum(language_quotas(counts, temperature).values()) == sum(counts.values())
