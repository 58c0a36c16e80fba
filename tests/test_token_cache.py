"""Tokenised rows on disk are the rows that tokenising gives, are made once, and are never trusted when damaged."""

import copy
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE, TEXT, alone_in_the_world, write_jsonl

from mlalign import data, token_cache
from mlalign.config import Config, Source
from mlalign.data import load_bitext, load_task
from mlalign.dataset import load_dataset
from mlalign.errors import UserError
from mlalign.examples import Counts, PairRows, TaskRows
from mlalign.model import load_tokenizer
from mlalign.token_cache import folder, key, tokenised, tokenizer_key

TURNS = [("system", "be brief"), ("user", "play the new song"), ("assistant", "artist: adele"), ("user", "and now?")]
CHAT = [{"role": role, "content": content} for role, content in [*TURNS, ("assistant", "None")]]
TASK = [
    {"messages": CHAT, "lang": "en"},
    {"messages": CHAT[:3], "lang": "de"},
    {"prompt": "play the song =>", "completion": " artist: adele", "lang": "ru"},
    {"prompt": "weck mich am frei", "completion": "tag um neun"},  # a token of the whole spans the edge
    {"prompt": "cut", "completion": " b" * 200, "lang": "de"},
    {"prompt": "nothing left " * 50, "completion": " b"},
    *({"prompt": f"{TEXT[i % 9]} {i} =>", "completion": f" {i}", "lang": "en"} for i in range(40)),
]
PAIRS = [
    {"src": "guten tag", "tgt": "good day", "src_lang": "de", "tgt_lang": "en", "id": 7},
    {"src": " ", "tgt": "dropped", "src_lang": "de", "tgt_lang": "en"},
    {"translation": {"ru": "какая завтра погода", "en": "good " * 200}},
    *({"src": TEXT[i % 9], "tgt": f"{TEXT[i % 3]} {i}", "src_lang": "de", "tgt_lang": "en"} for i in range(40)),
]
KINDS = {TaskRows: (load_task, TASK), PairRows: (load_bitext, PAIRS)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of a cache that is still empty."""
    monkeypatch.setenv("MLALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def task(tmp_path) -> Path:
    return write_jsonl(tmp_path / "task.jsonl", TASK)


def take(kind, path, tokenizer, max_length=100, may_read=True):
    """Rows and counts, from the cache alone unless it `may_read`."""
    sources = [Source(path=str(path))]

    def read(counts):
        assert may_read, "it is not in the cache"
        return KINDS[kind][0](sources, tokenizer, max_length, counts)

    return tokenised(kind, sources, tokenizer_key(tokenizer), max_length, read)


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


def test_texts_encoded_together_are_those_encoded_one_by_one(tokenizer):
    texts = [*TEXT, "", " ", "</s> in a text", "a  b\n"]
    alone = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert data._plain_ids(texts, tokenizer) == alone


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_which_are_encoded_together(tmp_path, tokenizer, kind, monkeypatch):
    load, rows = KINDS[kind]
    path, together, one_by_one = write_jsonl(tmp_path / "rows.jsonl", rows), Counts(), Counts()
    wanted = list(load([Source(path=str(path))], tokenizer, 100, together))
    monkeypatch.setattr(data, "_TOGETHER", 0)
    assert list(load([Source(path=str(path))], tokenizer, 100, one_by_one)) == wanted
    assert one_by_one == together


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cached_is_what_tokenising_gives(tmp_path, tokenizer, kind):
    load, rows = KINDS[kind]
    path, counts = write_jsonl(tmp_path / "rows.jsonl", rows), Counts()
    wanted = list(load([Source(path=str(path))], tokenizer, 100, counts))
    assert counts.truncated == 1 and sum(counts.dropped.values()) == 1
    for may_read in (True, False):
        found, told = take(kind, path, tokenizer, may_read=may_read)
        assert list(found) == wanted
        assert found[-1] == wanted[-1]
        assert (told, str(told)) == (counts, str(counts))
        assert found.lengths.tolist() == [len(row) for row in wanted]
        indices = {language: members.tolist() for language, members in found.by_language().items()}
        assert list(indices.items()) == list(members_of(wanted).items())
    with pytest.raises(IndexError):
        found[len(wanted)]


def members_of(rows) -> dict[str, list[int]]:
    members = {}
    for index, row in enumerate(rows):
        members.setdefault(row.language, []).append(index)
    return members


def test_cached_data_comes_in_the_same_order(settings, rows, cache):
    for name in ("task", "alignment"):
        settings[name]["language_temperature"] = 0.3
    settings["task"]["dev"], settings["alignment"]["dev"] = str(rows["task_dev"]), str(rows["bitext_dev"])
    config = Config.model_validate(settings)
    fresh, cached = (load_dataset(config, load_tokenizer(config.model)) for _ in range(2))
    assert len(entries(cache)) == 4
    for name, order in fresh.orders.items():
        assert order.take(100) == cached.orders[name].take(100)
    assert (list(fresh.task_dev), list(fresh.bitext_dev)) == (list(cached.task_dev), list(cached.bitext_dev))
    assert {k: str(v) for k, v in fresh.counts.items()} == {k: str(v) for k, v in cached.counts.items()}
    assert fresh.languages() == cached.languages()


def test_the_key_follows_all_that_tokens_follow_from(tmp_path, task, tokenizer):
    def of(path=task, kind=TaskRows, max_length=100, changed=tokenizer, **source) -> str:
        return key(kind, [Source(path=str(path), **source)], tokenizer_key(changed), max_length)

    def other(change) -> object:
        changed = copy.deepcopy(tokenizer)
        change(changed)
        return changed

    more = write_jsonl(tmp_path / "more.jsonl", [*TASK, TASK[0]])
    keys = [
        of(),
        of(more),
        of(kind=PairRows),
        of(max_length=99),
        of(columns={"prompt": "text"}),
        of(language="sw"),
        of(changed=other(lambda t: setattr(t, "chat_template", CHAT_TEMPLATE + " "))),
        of(changed=other(lambda t: setattr(t, "eos_token", "<pad>"))),
        of(changed=other(lambda t: setattr(t, "bos_token", None))),
        of(changed=other(lambda t: t.add_tokens(["adele"]))),
        key(TaskRows, [Source(path=str(task))] * 2, tokenizer_key(tokenizer), 100),
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    copied = write_jsonl(tmp_path / "copy.jsonl", TASK)
    assert of(copied) == of(), "staged to another folder, it is the same"


def test_what_cannot_be_hashed_is_not_cached(tmp_path, task, tokenizer, cache):
    class OfItsOwn(type(tokenizer)):
        pass

    own = copy.deepcopy(tokenizer)
    own.__class__ = OfItsOwn
    assert tokenizer_key(own) is None
    assert len(take(TaskRows, task, own)[0]) == len(TASK) - 1
    assert entries(cache) == []
    assert key(TaskRows, [Source(path=str(task))], None, 100) is None
    assert key(TaskRows, [Source(path="somebody/rows")], "known", 100) is None
    assert key(TaskRows, [Source(path=str(tmp_path / "absent.jsonl"))], "known", 100) is None


def test_a_template_that_tells_the_date_is_tokenised_every_day(tokenizer, monkeypatch):
    class Tomorrow(token_cache.date):
        @classmethod
        def today(cls):
            return token_cache.date.fromordinal(super().today().toordinal() + 1)

    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
    before = [tokenizer_key(each) for each in (tokenizer, dated)]
    monkeypatch.setattr(token_cache, "date", Tomorrow)
    after = [tokenizer_key(each) for each in (tokenizer, dated)]
    assert after[0] == before[0]
    assert after[1] != before[1]


@pytest.mark.parametrize("damage", ["cut", "emptied", "another byte", "nonsense"])
def test_a_damaged_entry_is_made_anew(task, tokenizer, cache, damage):
    wanted = list(take(TaskRows, task, tokenizer)[0])
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    middle = len(whole) // 2
    entry.write_bytes(
        {
            "cut": whole[:-9],
            "emptied": b"",
            "another byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "nonsense": b"{}" * 1000,
        }[damage]
    )
    assert list(take(TaskRows, task, tokenizer)[0]) == wanted
    assert list(take(TaskRows, task, tokenizer, may_read=False)[0]) == wanted


def test_a_folder_that_cannot_be_written_is_said_and_done_without(tmp_path, task, tokenizer, monkeypatch, capsys):
    wanted = list(take(TaskRows, task, tokenizer)[0])
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLALIGN_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert list(take(TaskRows, task, tokenizer)[0]) == wanted
    assert capsys.readouterr().out.count("tokenised rows cannot be kept in") == 1


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, tokenizer, cache, capsys):
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a b " * 30_000, "completion": " c"}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        rows, _ = take(TaskRows, long, tokenizer, max_length=10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(rows) == 1
    assert "tokenised rows cannot be kept" in capsys.readouterr().out
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_what_nothing_has_used_for_a_month_goes_when_something_new_comes(tmp_path, task, tokenizer, cache):
    take(TaskRows, task, tokenizer)
    (used,) = entries(cache)
    for name in ("unused.safetensors", "unused.lock", "killed.partial"):
        (cache / name).touch()
    for path in cache.iterdir():
        os.utime(path, (0, time.time() - 31 * 24 * 60 * 60))
    take(TaskRows, task, tokenizer, may_read=False)
    more = write_jsonl(tmp_path / "more.jsonl", [*TASK, TASK[0]])
    take(TaskRows, more, tokenizer)
    assert used in entries(cache) and len(entries(cache)) == 2
    assert not [path for path in cache.iterdir() if path.stem in ("unused", "killed")]


def _take_slowly(model: str, path: str, cache: str) -> tuple[bool, list]:
    """On one of two ranks: whether it tokenised, and what it got."""
    from mlalign import distributed
    from mlalign.config import Model

    os.environ["MLALIGN_CACHE"] = cache
    sources, tokenizer, calls = [Source(path=path)], load_tokenizer(Model(path=model)), []

    def read(counts):
        calls.append(1)
        time.sleep(1)
        return load_task(sources, tokenizer, 100, counts)

    distributed.barrier()
    rows, _ = tokenised(TaskRows, sources, tokenizer_key(tokenizer), 100, read)
    return bool(calls), list(rows)


def test_two_processes_at_once_tokenise_once(task, tokenizer, tiny_model, tmp_path, ranks):
    (read, mine), (other_read, theirs) = ranks(2).run(_take_slowly, str(tiny_model), str(task), str(tmp_path / "two"))
    assert read != other_read
    assert mine == theirs == list(load_task([Source(path=str(task))], tokenizer, 100, Counts()))


HOLD = """
import sys, time
from pathlib import Path
from mlalign import token_cache
with token_cache._one_at_a_time(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_holds_nobody_up(task, tokenizer, cache):
    lock = cache / f"{key(TaskRows, [Source(path=str(task))], tokenizer_key(tokenizer), 100)}.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], env=alone_in_the_world(), stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "mine\n"
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(take, TaskRows, task, tokenizer)
        time.sleep(1)
        waited = not waiting.done()
        holder.kill()
        rows, _ = waiting.result(timeout=60)
    assert waited
    assert len(rows) == len(TASK) - 1
    assert len(entries(cache)) == 1
    holder.communicate()


def test_who_waited_for_a_mistake_makes_it_too(task):
    def failing(counts):
        time.sleep(1)
        raise UserError("rows.jsonl:1: not valid JSON")

    sources = [Source(path=str(task))]
    with ThreadPoolExecutor() as pool:
        started = time.monotonic()
        tries = [pool.submit(tokenised, TaskRows, sources, "known", 100, failing) for _ in range(4)]
        assert [str(each.exception()) for each in tries] == ["rows.jsonl:1: not valid JSON"] * 4
    assert time.monotonic() - started < 4, "the first alone, then the others together"


def test_the_first_mistake_is_named_by_file_and_line_and_nothing_is_kept(tmp_path, tokenizer, cache):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "a" * 500, "completion": "b"})
    path.write_text("\n".join([*[good] * 2000, '{"prompt": "a"}', "no json"]))
    with pytest.raises(UserError, match=r"rows.jsonl:2001: no field 'completion'"):
        take(TaskRows, path, tokenizer)
    assert entries(cache) == []


def test_a_file_that_changes_meanwhile_is_not_kept(task, tokenizer, cache):
    sources = [Source(path=str(task))]

    def read(counts):
        yield from load_task(sources, tokenizer, 100, counts)
        write_jsonl(task, TASK[:3])

    tokenised(TaskRows, sources, tokenizer_key(tokenizer), 100, read)
    assert entries(cache) == []


def test_no_row_at_all_is_one_sentence_every_time(tmp_path, settings):
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "x " * 400, "completion": "y"}])
    settings["task"]["train"] = str(long)
    config = Config.model_validate(settings)
    for _ in range(2):
        with pytest.raises(UserError, match=r"task.train: every row was dropped: .*1 dropped"):
            load_dataset(config, load_tokenizer(config.model))


def test_other_tokens_need_another_format(tmp_path):
    """Where this fails, rows come to other tokens than before: raise FORMAT and put the new digest here."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_ = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    found = []
    for load, rows in KINDS.values():
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        found += load([Source(path=str(path))], tokenizer, 200, Counts())
    digest = hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()
    assert (token_cache.FORMAT, digest) == (4, "6eeeaf7070102380")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert folder() == tmp_path / "cache" / "tokens"
    monkeypatch.delenv("MLALIGN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert folder() == Path("/x/mlalign/tokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder() == Path.home() / ".cache" / "mlalign" / "tokens"
