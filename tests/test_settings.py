"""Every setting of training has its effect: `mlalign train` on two ranks against a plain PyTorch loop.

Compared are the weights that a run exports and the numbers that it logs, by which its users judge it. A setting that
got lost on its way to DeepSpeed would leave both as if it had its default.
"""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from test_world_size import relative_error

from mlalign.config import Alignment, Config, Interleave, Lora, Optimizer
from mlalign.dataset import load_dataset
from mlalign.model import load_tokenizer

TOLERANCE = 1e-5
FELT = 100 * TOLERANCE  #: what a setting must change at least, or comparing with the loop says nothing of it

Weights = dict[str, torch.Tensor]
Lines = list[dict[str, float]]

CASES: dict[str, dict[str, Any]] = {
    "lora": {
        "seed": 3,
        "lora": {"r": 4, "alpha": 5, "dropout": 0.0, "target_modules": ["q_proj", "o_proj", "up_proj"]},
        "optimizer": {
            "lr": 5e-3,
            "betas": [0.8, 0.95],
            "eps": 1e-4,
            "weight_decay": 0.5,
            "clip": 0.0,
            "schedule": "cosine",
            "warmup_ratio": 0.4,
            "steps": 5,
        },
        "alignment": {
            "batch_size": 6,
            "temperature": 0.3,
            "layer": 3,
            "pooling": "last",
            "infonce": "one_way",
            "positives": "pair",
            "weight": 4.0,
        },
    },
    "full": {
        "lora": None,
        "interleave": {"ratio": "1:2"},
        "optimizer": {
            "lr": 3e-3,
            "betas": [0.85, 0.9],
            "eps": 1e-4,
            "weight_decay": 0.5,
            "clip": 0.5,
            "schedule": "inverse_sqrt",
            "warmup_ratio": 0.5,
            "steps": 4,
        },
        "alignment": {"batch_size": 4, "micro_batch_size": 1, "temperature": 0.2, "layer": 1, "weight": 1.5},
    },
}

#: A case, one of its settings, and another value for it: the default, or what else there is to choose.
CHANGES = [
    ("lora", "seed", 1),
    ("lora", "lora.r", 8),
    ("lora", "lora.alpha", 16),
    ("lora", "lora.target_modules", "all-linear"),
    ("lora", "optimizer.lr", 4e-3),
    ("lora", "optimizer.betas", [0.9, 0.95]),
    ("lora", "optimizer.betas", [0.8, 0.999]),
    ("lora", "optimizer.eps", 1e-8),
    ("lora", "optimizer.weight_decay", 0.0),
    ("lora", "optimizer.clip", 1.0),
    ("lora", "optimizer.schedule", "constant"),
    ("lora", "optimizer.schedule", "linear"),
    ("lora", "optimizer.schedule", "inverse_sqrt"),
    ("lora", "optimizer.warmup_ratio", 0.03),
    ("lora", "alignment.temperature", 0.1),
    ("lora", "alignment.layer", 2),
    ("lora", "alignment.pooling", "mean"),
    ("lora", "alignment.infonce", "symmetric"),
    ("lora", "alignment.positives", "id"),
    ("lora", "alignment.weight", 1.0),
    ("full", "interleave.ratio", "1:1"),
    ("full", "optimizer.weight_decay", 0.0),
    ("full", "optimizer.clip", 0.0),
]


@pytest.fixture(scope="session")
def biased_model(tmp_path_factory, tiny_model) -> Path:
    """`tiny_model` with biases, and with vectors that are neither 0 nor 1, so that decay would show in each."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    path = tmp_path_factory.mktemp("biased")
    torch.manual_seed(0)
    lm = LlamaForCausalLM(AutoConfig.from_pretrained(tiny_model, attention_bias=True, mlp_bias=True))
    for name, parameter in lm.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, *((0.5, 1.5) if "norm" in name else (-0.1, 0.1)))
    lm.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    return path


@pytest.fixture
def case(settings, biased_model):
    """`case(name)`: all settings of one of `CASES`."""
    settings |= {"model": {"path": str(biased_model)}, "log_every": 1}
    settings["task"]["batch_size"] = 6  # 3 rows a rank: micro-batches of 2 and 1
    return lambda name: merged(settings, CASES[name])


def merged(values: Any, changes: Any) -> Any:
    """Nested dicts, those of `changes` over those of `values`."""
    if not (isinstance(values, dict) and isinstance(changes, dict)):
        return copy.deepcopy(changes)
    return {k: merged(values.get(k), changes[k]) if k in changes else values[k] for k in [*values, *changes]}


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    section, _, name = key.rpartition(".")
    return merged(values, {section: {name: value}} if section else {name: value})


@cache
def plain_loop(values: str) -> tuple[Weights, Lines]:
    """Weights, and what every step should log. Args: values: as JSON."""
    lines: Lines = []
    return reference.train(Config.model_validate_json(values), log=lines), lines


def wanted(values: dict[str, Any]) -> tuple[Weights, Lines]:
    return plain_loop(json.dumps(values | {"run_dir": "nowhere"}))


def run(path: Path) -> None:
    """`mlalign train` on one rank of many."""
    from mlalign.commands.train import train
    from mlalign.config import load

    train(load(path))


def trained(ranks, values: dict[str, Any], stage: int) -> tuple[Weights, Lines]:
    """Weights as two ranks export them, by their names in the model, and the lines of metrics.jsonl."""
    run_dir = Path(values["run_dir"])
    path = run_dir.with_suffix(".yaml")
    OmegaConf.save(OmegaConf.create(values | {"deepspeed": f"ds_configs/zero{stage}.json"}), path)
    ranks(2).run(run, path)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    if not values["lora"]:
        return load_file(run_dir / "model" / "model.safetensors"), lines
    adapter = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): weight for name, weight in adapter.items()}, lines


def vectors(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if weight.dim() == 1}


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_run_does_what_its_settings_say(ranks, case, name, stage):
    values = case(name)
    weights, lines = trained(ranks, values, stage)
    wanted_weights, wanted_lines = wanted(values)
    assert relative_error(weights, wanted_weights) < TOLERANCE
    if name == "full":
        assert relative_error(vectors(weights), vectors(wanted_weights)) < TOLERANCE
    assert [line["step"] for line in lines] == list(range(1, values["optimizer"]["steps"] + 1))
    for line, expected, padding in zip(lines, wanted_lines, paddings(values)):
        assert {key: line[key] for key in expected} == pytest.approx(expected, rel=TOLERANCE, abs=1e-12)
        assert line["train/epoch"] == pytest.approx(line["step"] * values["task"]["batch_size"] / 48)
        if stage == 3:  # one pass a micro-batch; elsewhere bitext may take several that pad less
            assert line["train/padding"] == pytest.approx(padding, rel=1e-4)
        assert 0 < line["train/padding"] <= padding * 1.0001


def paddings(values: dict[str, Any]) -> list[float]:
    """For each step the share of positions on two ranks that hold no token, where a micro-batch is one pass.

    Rows are dealt out longest first, to the ranks in turn; a pass is as wide as its longest row, or side of a pair.
    """
    config, shares = Config.model_validate(values), []
    orders = load_dataset(config, load_tokenizer(config.model)).orders
    batches = zip(("task", "alignment"), (config.task, config.alignment), config.interleave.parts)
    batches = [(orders[name], section) for name, section, count in batches for _ in range(count)]
    for _ in range(config.optimizer.steps):
        passes: list[list[int]] = []
        for order, section in batches:
            rows = sorted(order.take(section.batch_size), key=len, reverse=True)
            step = 2 * section.micro_batch_size
            for start in range(0, len(rows), step):
                passes += [lengths(rows[start : start + step][rank::2]) for rank in (0, 1)]
        positions = sum(len(each) * max(each) for each in passes)
        shares.append(1 - sum(map(sum, passes)) / positions)
    return shares


def lengths(rows: list) -> list[int]:
    return [len(ids) for row in rows for ids in ([row.src, row.tgt] if hasattr(row, "src") else [row.ids])]


def test_between_two_log_lines_losses_are_means_and_the_rest_is_the_last_steps(ranks, case):
    """With clipping of adapters, of which the norm that is logged knows nothing."""
    values = changed(case("lora") | {"log_every": 3}, "optimizer.clip", 0.1)
    weights, lines = trained(ranks, values, stage=2)
    wanted_weights, steps = wanted(values)
    assert relative_error(weights, wanted_weights) < TOLERANCE
    assert [line["step"] for line in lines] == [3, 5]
    for line, since in zip(lines, (steps[:3], steps[3:])):
        losses = {name: sum(step[name] for step in since) / len(since) for name in since[0] if name.endswith("_loss")}
        expected = since[-1] | losses
        assert {key: line[key] for key in expected} == pytest.approx(expected, rel=TOLERANCE)
        assert line["train/grad_norm"] > 0.2, "clipping was not tried"


@pytest.mark.parametrize(("name", "key", "value"), CHANGES)
def test_each_of_these_settings_is_felt(case, name, key, value):
    """Or the comparisons above would pass without it."""
    weights, lines = wanted(case(name))
    other_weights, other_lines = wanted(changed(case(name), key, value))
    if {k: w.shape for k, w in weights.items()} == {k: w.shape for k, w in other_weights.items()}:
        assert relative_error(other_weights, weights) > FELT
    else:
        assert other_lines[-1]["train/grad_norm"] != pytest.approx(lines[-1]["train/grad_norm"], rel=FELT)


def test_decay_of_vectors_would_be_felt(case, monkeypatch):
    def all_alike(parameters, config: Config) -> torch.optim.Optimizer:
        settings = config.optimizer
        return torch.optim.AdamW(parameters, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)

    weights, _ = wanted(case("full"))
    monkeypatch.setattr(reference, "adamw", all_alike)
    assert relative_error(vectors(reference.train(Config.model_validate(case("full")))), vectors(weights)) > FELT


def test_every_setting_of_an_update_is_among_them():
    """One that is added to the schema needs a value in `CASES`, and another in `CHANGES`."""
    elsewhere = {
        Lora: {"dropout"},  # no other loop draws the same masks: test_loss.py, test_model.py
        Optimizer: {"steps", "epochs", "max_skipped_steps"},
        Alignment: {"train", "dev", "streaming", "batch_size", "micro_batch_size", "max_length", "language_temperature"}
        | {"negatives"},  # test_schedule.py
        Interleave: {"mode", "micro_batches"},  # the same
    }
    for section, names in elsewhere.items():
        prefix = f"{section.__name__.lower()}."
        tried = {key.removeprefix(prefix) for _, key, _ in CHANGES if key.startswith(prefix)}
        assert tried == set(section.model_fields) - names
