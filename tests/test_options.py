"""Every option of every verb arrives where it belongs: what is typed against the whole of what the verb is given."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from omegaconf import OmegaConf
from typer.testing import CliRunner

from mlalign.config import Config
from mlalign.verbs import app

VERBS = typer.main.get_command(app).commands


class Option(NamedTuple):
    """One parameter of a verb: how it is typed with a value that is not its default, and what should come of it."""

    typed: list[str]
    changes: dict[str, Any]  #: fields of what the command is given -> values


def one(typed: str, **changes: Any) -> Option:
    return Option(typed.split(), changes)


#: Verb -> its parameters by the names that typer has for them, required arguments first, as they are typed.
#: Values differ from each other, so that two that change places are found out; flags are also tried one by one.
OPTIONS: dict[str, dict[str, Option]] = {
    "evaluate": {
        "model": one("some/model", model="some/model"),
        "output": one("--output out", output=Path("out")),
        "task": one("--task translation", task="translation"),
        "test": one("--test a.jsonl --test b.jsonl", test=("a.jsonl", "b.jsonl")),
        "adapter": one("--adapter c --adapter d", adapters=("c", "d")),
        "backend": one("--backend vllm", backend="vllm"),
        "precision": one("--precision bf16", precision="bf16"),
        "beams": one("--beams 2", beams=2),
        "batch_size": one("--batch-size 3", batch_size=3),
        "max_new_tokens": one("--max-new-tokens 4", max_new_tokens=4),
        "trust_remote_code": one("--trust-remote-code", trust_remote_code=True),
        "max_rows": one("--max-rows 5", max_rows=5),
        "comet": one("--comet some/metric", comet="some/metric"),
        "supervised": one("--supervised en,de", supervised=["en", "de"]),
        "aligned": one("--aligned sv,es,", aligned=["sv", "es"]),
        "seed": one("--seed 6", seed=6),
        "score_only": one("--score-only", score_only=True),
    },
    "compare": {
        "evaluations": one("a b", evaluations=(Path("a"), Path("b"))),
        "output": one("--output out", output=Path("out")),
        "names": one("--names one,two", names=["one", "two"]),
        "metric": one("--metric f1", metric="f1"),
        "supervised": one("--supervised en,de", supervised=["en", "de"]),
        "aligned": one("--aligned sv", aligned=["sv"]),
        "seed": one("--seed 2", seed=2),
    },
    "probe": {
        "model": one("some/model", model="some/model"),
        "data": one("--data texts", data="texts"),
        "output": one("--output out", output=Path("out")),
        "adapter": one("--adapter a", adapter="a"),
        "compare": one("--compare b", compare="b"),
        "languages": one("--languages en,de", languages=["en", "de"]),
        "max_sentences": one("--max-sentences 7", max_sentences=7),
        "layers": one("--layers 0-2,4", layers="0-2,4"),
        "pooling": one("--pooling mean,last", pooling=("mean", "last")),
        "pool_bos": one("--no-pool-bos", pool_bos=False),
        "precision": one("--precision fp32", precision="fp32"),
        "trust_remote_code": one("--trust-remote-code", trust_remote_code=True),
        "batch_size": one("--batch-size 8", batch_size=8),
        "split": one("--split devtest", split="devtest"),
        "deepspeed": one("--deepspeed ds_configs/zero3.json", deepspeed="ds_configs/zero3.json"),
        "keep_states": one("--keep-states", keep_states=True),
        "report": one("--report c --report d", reports=(Path("c"), Path("d"))),
        "metric": one("--metric f1", metric="f1"),
    },
    "merge": {
        "task_adapter": one("a", task_adapter="a"),
        "alignment_adapter": one("b", alignment_adapter="b"),
        "output": one("--output out", output=Path("out")),
        "weight": one("--weight auto", weight="auto"),
        "method": one("--method dare_ties", method="dare_ties"),
        "layers": one("--layers 2", layers=2),
        "rank": one("--rank 3", rank=3),
        "density": one("--density 0.25", density=0.25),
        "seed": one("--seed 4", seed=4),
        "model": one("--model some/model", model="some/model"),
        "dev": one("--dev c --dev d", dev=("c", "d")),
        "task": one("--task items", task="items"),
        "grid": one("--grid 0,0.5", grid="0,0.5"),
        "max_rows": one("--max-rows 5", max_rows=5),
        "batch_size": one("--batch-size 6", batch_size=6),
        "max_new_tokens": one("--max-new-tokens 7", max_new_tokens=7),
        "trust_remote_code": one("--trust-remote-code", trust_remote_code=True),
    },
    "prepare": {
        "dataset": one("massive", dataset="massive"),
        "source": one("in.tar.gz", source="in.tar.gz"),
        "output": one("out", output=Path("out")),
        "form": one("--format plain", form="plain"),
        "languages": one("--languages en,de", languages=["en", "de"]),
        "max_rows": one("--max-rows 2", max_rows=2),
        "balance": one("--balance", balance=True),
        "seed": one("--seed 3", seed=3),
        "against": one("--against a --against b", against=("a", "b")),
        "dev": one("--dev 4", dev=4),
        "pivot": one("--pivot sv", pivot="sv"),
        "directions": one("--directions to-english", directions="to-english"),
    },
    "plan": {
        "config": one("c.yaml"),
        "overrides": one("seed=7 log_every=9", seed=7, log_every=9),
        "ranks": one("--ranks 2", ranks=2),
        "device": one("--device cuda", device="cuda"),
        "gpus_per_node": one("--gpus-per-node 3", gpus_per_node=3),
        "memory_per_gpu": one("--memory-per-gpu 5.5", memory_per_gpu=5.5),
        "tokens_per_second": one("--tokens-per-second 6.5", tokens_per_second=6.5),
        "measure": one("--measure 8", measure=8),
        "json": one("--json plan.json", json=Path("plan.json")),
    },
    "train": {"config": one("c.yaml"), "overrides": one("seed=7 log_every=9", seed=7, log_every=9)},
    "inspect": {"config": one("c.yaml"), "overrides": one("seed=7 log_every=9", seed=7, log_every=9)},
    "doctor": {"config": one("c.yaml"), "overrides": one("seed=7 log_every=9", seed=7, log_every=9)},
    "demo": {"output": one("--output out", output=Path("out")), "seed": one("--seed 2", seed=2)},
}

#: What is not given, where that is not what the fields say: `mlalign merge` reads numbers itself.
UNGIVEN = {"merge": {"weight": "0.5"}, "demo": {"output": Path("runs/demo"), "seed": 0}}

#: Fields that no option sets: for `mlalign merge`; and the command line, as it was typed.
INTERNAL = {"evaluate": {"quiet"}, "plan": {"config"}}

SINGLE = [(verb, name) for verb in OPTIONS for name in OPTIONS[verb]]


@pytest.fixture
def given(monkeypatch):
    """`given(*words)`: the arguments with which a command line calls the function of its verb."""

    def call(*typed: str) -> tuple:
        calls: list[tuple] = []
        for verb in OPTIONS:
            recorded = partial(_record, calls, verb)
            monkeypatch.setattr(f"mlalign.commands.{verb}.{verb}", recorded)
        result = CliRunner().invoke(app, typed)
        assert result.exit_code == 0, result.output
        ((verb, arguments),) = calls
        assert verb in typed
        return arguments

    return call


def _record(calls: list[tuple], verb: str, *arguments: Any) -> None:
    calls.append((verb, arguments))


@pytest.fixture
def recipe(settings, tmp_path) -> dict[str, Any]:
    """What the file c.yaml in the working directory holds."""
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "c.yaml")
    return settings


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)


def required(verb: str) -> set[str]:
    return {parameter.name for parameter in VERBS[verb].params if parameter.required}


def chosen(verb: str, names: Iterable[str]) -> list[Option]:
    return [option for name, option in OPTIONS[verb].items() if name in required(verb) | set(names)]


def command_line(verb: str, names: Iterable[str]) -> list[str]:
    """With these options, and those that the verb cannot do without."""
    return [verb, *(word for option in chosen(verb, names) for word in option.typed)]


def wanted(verb: str, names: Iterable[str], recipe: dict[str, Any]) -> tuple:
    """What the verb's function is to be called with."""
    changes = UNGIVEN.get(verb, {}).copy()
    for option in chosen(verb, names):
        changes |= option.changes
    if verb == "demo":
        return changes["output"], changes["seed"]
    if verb == "doctor" and "config" not in names:
        return (None,)
    if verb in ("train", "inspect", "doctor"):
        return (Config.model_validate(recipe | changes),)
    settings = import_module(f"mlalign.commands.{verb}").Settings
    if verb != "plan":
        return (settings(**changes),)
    overrides = {key: changes.pop(key) for key in ("seed", "log_every") if key in changes}
    device = {"device": None if "measure" in names else "cpu"}  # what is here, or what the environment asks for
    typed = {"config": " ".join(["c.yaml", *OPTIONS[verb]["overrides"].typed] if overrides else ["c.yaml"])}
    return Config.model_validate(recipe | overrides), settings(**device | typed | changes)


def test_every_verb_and_every_option_is_in_the_table():
    assert {verb: {parameter.name for parameter in command.params} for verb, command in VERBS.items()} == {
        verb: set(options) for verb, options in OPTIONS.items()
    }


@pytest.mark.parametrize("verb", [verb for verb in OPTIONS if verb not in ("train", "inspect", "doctor", "demo")])
def test_every_setting_of_a_verb_can_be_given(verb):
    fields = {field.name for field in dataclasses.fields(import_module(f"mlalign.commands.{verb}").Settings)}
    changed = {name for option in OPTIONS[verb].values() for name in option.changes}
    assert fields - changed == INTERNAL.get(verb, set())


@pytest.mark.parametrize(("verb", "name"), SINGLE)
def test_an_option_on_its_own_sets_what_it_is_called_after_and_nothing_else(given, recipe, verb, name):
    names = {name} | ({"config"} if name == "overrides" else set())
    assert given(*command_line(verb, names)) == wanted(verb, names, recipe)
    if name not in required(verb):
        assert wanted(verb, names, recipe) != wanted(verb, names - {name}, recipe), "no value but the default was tried"


@pytest.mark.parametrize("verb", OPTIONS)
def test_all_options_at_once_set_all_that_they_are_called_after(given, recipe, verb):
    assert given(*command_line(verb, OPTIONS[verb])) == wanted(verb, OPTIONS[verb], recipe)


@pytest.mark.parametrize("verb", OPTIONS)
def test_what_is_not_given_has_its_default(given, recipe, verb):
    assert given(*command_line(verb, ())) == wanted(verb, (), recipe)


def test_what_the_deepspeed_launcher_adds_changes_nothing(given):
    assert given("--local_rank", "1", "demo") == wanted("demo", (), {})
