"""Telemetry of gradients: the same as two plain backward passes give, on any number of ranks and ZeRO stage."""

import json
import math
import re
from pathlib import Path

import pytest
import reference
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from mlalign import gradients
from mlalign.config import Config, load
from mlalign.errors import UserError


def measured(values: dict, zero: dict, elements: int) -> dict[str, float]:
    """On one rank of many: the first step of `mlalign train`."""
    from mlalign import model, sharding
    from mlalign.commands import train
    from mlalign.dataset import load_dataset
    from mlalign.loader import Loader
    from mlalign.packing import choose_pad
    from mlalign.tracker import Meter

    usual, gradients._ELEMENTS = gradients._ELEMENTS, elements
    config = Config.model_validate(values)
    tokenizer = model.load_tokenizer(config.model)
    dataset = load_dataset(config, tokenizer)
    engine = train._make_engine(config, sharding.engine_config(config, zero), layer=2)
    engine.train()
    meter = gradients.GradientMeter(engine.module)
    with meter:
        batches = Loader(config, dataset.orders, choose_pad(engine, config.model, tokenizer), end=1).take()
        train._backward(engine, config, batches, Meter(), meter.begin)
    gradients._ELEMENTS = usual
    assert not any(parameter._backward_hooks for parameter in engine.module.parameters())
    found = meter.read()
    engine.destroy()
    return found


def wanted(config: Config, elements: int, batches: int = 1) -> dict[str, float]:
    """From two backward passes over whole batches, of layers 0 to 2; of so many batches of each objective."""
    lm = reference.load(config)
    dataset = reference.load_dataset(config, reference.load_tokenizer(config.model))
    named = {name: p for name, p in lm.named_parameters() if p.requires_grad and not reference.is_above(name, 2)}
    task, alignment = dataset.orders["task"], dataset.orders["alignment"]
    losses = [torch.zeros(()), torch.zeros(())]
    for _ in range(batches):
        losses[0] = losses[0] + reference.task_loss(lm, task.take(config.task.batch_size))
        pairs = alignment.take(config.alignment.batch_size)
        loss = reference.alignment_loss(lm, pairs, 2, config.alignment.temperature)
        losses[1] = losses[1] + config.alignment.weight * loss
    layers: dict[int, list[list[torch.Tensor]]] = {}
    by_name = [dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True))) for loss in losses]
    for name, parameter in named.items():
        block = re.search(r"layers\.(\d+)\.", name)
        both = [each[name] if each[name] is not None else torch.zeros_like(parameter) for each in by_name]
        layers.setdefault(int(block.group(1)) + 1 if block else 0, []).append(both)
    found = {}
    for layer, parameters in layers.items():
        every = math.ceil(sum(both[0].numel() for both in parameters) / elements)
        while any(math.gcd(every, both[0].shape[-1]) > 1 for both in parameters):
            every += 1
        task, alignment = (
            torch.cat([both[side].flatten()[::every].double() for both in parameters]) for side in (0, 1)
        )
        found[f"gradients/cosine_layer_{layer:02}"] = float(task @ alignment / task.norm() / alignment.norm())
        found[f"gradients/norm_ratio_layer_{layer:02}"] = float(alignment.norm() / task.norm())
    return found


@pytest.mark.parametrize("adapters", ["lora", "full"])
@pytest.mark.parametrize("size, stage", [(1, 0), (2, 1), (2, 2), (2, 3), (4, 0), (4, 3)])
def test_cosines_and_norms_are_those_of_two_plain_passes(ranks, settings, size, stage, adapters):
    settings["alignment"] |= {"weight": 0.7, "micro_batch_size": 2}  # in chunks, all but one encoded twice
    if adapters == "full":
        settings["lora"] = None
    found = ranks(size).run(measured, settings, {"zero_optimization": {"stage": stage}}, 2**20)
    assert all(each == found[0] for each in found)
    expected = wanted(Config.model_validate(settings), 2**20)
    layers = [1, 2] if adapters == "lora" else [0, 1, 2]
    names = [f"gradients/{kind}_layer_{layer:02}" for layer in layers for kind in ("cosine", "norm_ratio")]
    assert list(found[0]) == names
    assert found[0] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert any(abs(expected[name]) > 1e-2 for name in names if "cosine" in name)


def test_blocks_that_run_twice_give_the_same(ranks, settings):
    settings |= {"lora": None, "model": settings["model"] | {"gradient_checkpointing": True}}
    found = ranks(2).run(measured, settings, {"zero_optimization": {"stage": 2}}, 2**20)[0]
    assert found == pytest.approx(wanted(Config.model_validate(settings), 2**20), rel=1e-3, abs=1e-4)


def test_batches_that_take_turns_in_a_step_are_added_up_by_objective(ranks, settings):
    settings |= {"interleave": {"mode": "micro_batch", "micro_batches": 4}}
    settings["alignment"]["weight"] = 0.7
    found = ranks(2).run(measured, settings, {"zero_optimization": {"stage": 1}}, 2**20)[0]
    assert found == pytest.approx(wanted(Config.model_validate(settings), 2**20, batches=2), rel=1e-3, abs=1e-4)


def test_embeddings_that_are_tied_to_the_lm_head_have_its_gradient_too(ranks, settings, tmp_path):
    tied = reference.load(Config.model_validate(settings | {"lora": None}))
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    reference.load_tokenizer(Config.model_validate(settings).model).save_pretrained(tmp_path / "tied")
    settings |= {"lora": None, "model": {"path": str(tmp_path / "tied")}}
    found = ranks(2).run(measured, settings, {"zero_optimization": {"stage": 3}}, 2**20)[0]
    expected = wanted(Config.model_validate(settings), 2**20)
    assert "gradients/cosine_layer_00" in found and found == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("shapes", [[(1000, 64), (64,)], [(512, 96), (96, 30)]])
def test_every_column_of_a_matrix_is_looked_at(shapes, monkeypatch):
    """Where the number of elements is a multiple of the row length, every n-th would be of a few columns."""
    monkeypatch.setattr(gradients, "_ELEMENTS", 1000)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    every = gradients._stride(parameters)
    assert every >= sum(parameter.numel() for parameter in parameters) / 1000
    for parameter in parameters:
        seen = torch.arange(parameter.numel())[::every] % parameter.shape[-1]
        assert len(seen.unique()) == min(len(seen), parameter.shape[-1])


def test_of_a_large_layer_every_nth_element_is_looked_at(ranks, settings):
    found = ranks(2).run(measured, settings, {"zero_optimization": {"stage": 2}}, 100)[0]
    assert found == pytest.approx(wanted(Config.model_validate(settings), 100), rel=1e-3, abs=1e-4)
    assert found != pytest.approx(wanted(Config.model_validate(settings), 2**20), rel=1e-3, abs=1e-4)


def test_a_run_logs_them_and_takes_the_same_steps(settings, tmp_path, capfd):
    """At log steps, in metrics.jsonl and TensorBoard; the console stays readable."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from mlalign.commands.train import train

    losses = {}
    for name, logged in (("with", True), ("without", False)):
        more = {"run_dir": str(tmp_path / name), "log_every": 2, "log_gradients": logged}
        train(Config.model_validate(settings | more))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["train/task_loss"] for line in lines if "train/task_loss" in line]
        steps = [line["step"] for line in lines if "gradients/cosine_layer_01" in line]
        assert steps == ([2, 3] if logged else [])
    assert losses["with"] == losses["without"]
    weights = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in losses]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    events = EventAccumulator(str(tmp_path / "with/tensorboard")).Reload()
    assert len(events.Scalars("gradients/norm_ratio_layer_02")) == 2
    assert "cosine" not in capfd.readouterr().out


def test_alternating_runs_have_nothing_to_compare_and_are_refused(settings, tmp_path):
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "c.yaml")
    micro_batches = ["interleave.mode=micro_batch", "interleave.micro_batches=2"]
    for words in (["alignment=null", "interleave.ratio=1:0"], micro_batches, [*micro_batches, "interleave.ratio=2:1"]):
        assert load(tmp_path / "c.yaml", ["log_gradients=true", *words])
    for words in (["interleave.mode=alternate"], [*micro_batches, "interleave.ratio=4:2"]):
        with pytest.raises(UserError, match=r"log_gradients compares two objectives of one step: with this interleave"):
            load(tmp_path / "c.yaml", ["log_gradients=true", *words])


def test_a_step_that_is_left_out_logs_none(settings, monkeypatch):
    """A number that is none would be no JSON."""
    from mlalign.commands import train

    whole = train._backward

    def broken(engine, config, batches, meter, *told):
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient * torch.nan)
        return whole(engine, config, batches, meter, *told)

    monkeypatch.setattr(train, "_backward", broken)
    train.train(Config.model_validate(settings | {"log_every": 1, "log_gradients": True}))
    lines = [json.loads(line) for line in (Path(settings["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/skipped_steps"] for line in lines if "train/skipped_steps" in line] == [1, 2, 3]
    assert not any(name.startswith("gradients/") for line in lines for name in line)


def test_a_run_of_one_objective_logs_none(settings):
    from mlalign.commands.train import train

    settings |= {"alignment": None, "interleave": {"ratio": "1:0"}, "log_gradients": True}
    train(Config.model_validate(settings))
    assert "gradients/" not in (Path(settings["run_dir"]) / "metrics.jsonl").read_text()
