"""Silent corruptions of ZeRO in this very use, each with a test on real ranks that fails if it comes back.

A step that holds no task batch reaches no parameter above the alignment layer. ZeRO-3, and every stage with an
offloaded optimizer, would apply the previous step's gradient to them again; AdamW would move them by its momentum.
ZeRO-3 overwrites instead of accumulating, or adds onto stale buffers, where the order of passes is not respected.
"""

import pytest
import reference
import torch
from test_world_size import ADAM, relative_error, run_steps

from mlalign.config import Config
from mlalign.zero import read_deepspeed

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
LAYOUTS = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero1_offload": {"stage": 1, **OFFLOAD},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, **OFFLOAD},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 600},  # or all of the tiny model would be whole
    "zero3_offload": {"stage": 3, **OFFLOAD, "offload_param": {"device": "cpu"}},
}


def zero(layout: str) -> dict:
    return {"zero_optimization": LAYOUTS[layout], "zero_force_ds_cpu_optimizer": False}


def alignment_step_after_task_step(values: dict, zero: dict, optimizer: str, guarded: bool, rest: bool) -> dict:
    """How far a task step, and the alignment step after it, move the parameters above and below the layer.

    guarded: call `rest_untouched`; rest: set the learning rate above the layer to 0.
    """
    from mlalign import checkpoint, model, sharding
    from mlalign.commands import train
    from mlalign.dataset import load_dataset
    from mlalign.loader import Loader
    from mlalign.objectives import rest_untouched
    from mlalign.tracker import Meter

    config = Config.model_validate(values)
    make = sharding.make_optimizer
    if optimizer == "sgd":
        sharding.make_optimizer = lambda config, groups, zero: torch.optim.SGD(groups, lr=0.1, weight_decay=0.0)
    else:
        sharding.make_optimizer = lambda config, groups, zero: torch.optim.AdamW(groups, lr=0.1)
    engine = train._make_engine(config, sharding.engine_config(config, zero), layer=2)
    sharding.make_optimizer = make
    dataset = load_dataset(config, model.load_tokenizer(config.model))
    engine.train()

    def snapshot() -> dict[str, torch.Tensor]:
        return checkpoint._gathered(engine.module.lm, trainable_only=True)

    def moved(before: dict, after: dict, above: bool) -> float:
        upper = ("layers.2.", "layers.3.", "lm_head", "model.norm")
        names = [name for name in before if any(part in name for part in upper) == above]
        assert names or not before
        return max((float((after[name] - before[name]).abs().max()) for name in names), default=0.0)

    loader = Loader(config, dataset.orders, pad=0, end=2)
    states = [snapshot()]
    for _ in range(2):
        with_task = train._backward(engine, config, loader.take(), Meter())
        if not with_task and guarded:
            rest_untouched(engine)
        sharding.set_lr(engine.optimizer, 0.1, rest_above=rest and not with_task)
        engine.step()
        states.append(snapshot())
    norm = sharding.grad_norm(engine)
    engine.destroy()
    start, task, align = states
    return {
        "task_above": moved(start, task, True),
        "align_above": moved(task, align, True),
        "align_below": moved(task, align, False),
        "norm": norm,
    }


def alternating(settings: dict, adapters: str) -> dict:
    settings["interleave"] = {"mode": "alternate"}
    settings["optimizer"] |= {"clip": 1e6}
    if adapters == "full":
        settings["lora"] = None
    return settings


@pytest.mark.parametrize("adapters", ["lora", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_alignment_step_gives_the_layers_above_no_stale_gradient(ranks, settings, layout, adapters):
    """Plain SGD with its full learning rate everywhere: whatever moves above the layer is a stale gradient."""
    values = alternating(settings, adapters)
    moved = ranks(2).run(alignment_step_after_task_step, values, zero(layout), "sgd", True, False)[0]
    assert moved["task_above"] > 1e-4
    assert moved["align_below"] > 1e-4
    assert moved["align_above"] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_alignment_steps_gradient_norm_counts_nothing_stale(ranks, settings, layout):
    """What clipping divides by is the same on every layout: SGD from the same start takes the same two steps."""
    values = alternating(settings, "lora")
    steps = [
        ranks(2).run(alignment_step_after_task_step, values, zero(name), "sgd", True, True)[0]
        for name in ("zero0", layout)
    ]
    assert steps[1]["norm"] == pytest.approx(steps[0]["norm"], rel=1e-4)


@pytest.mark.parametrize("layout", ["zero1_offload", "zero2_offload", "zero3"])
def test_deepspeed_still_needs_that_guard(ranks, settings, layout):
    """Where this fails, DeepSpeed has mended it, and `rest_untouched` can go."""
    values = alternating(settings, "lora")
    moved = ranks(2).run(alignment_step_after_task_step, values, zero(layout), "sgd", False, False)[0]
    assert moved["align_above"] > 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_alignment_step_of_adamw_leaves_the_layers_above(ranks, settings, layout):
    values = alternating(settings, "full")
    values["optimizer"]["weight_decay"] = 0.1
    moved = ranks(2).run(alignment_step_after_task_step, values, zero(layout), "adamw", True, True)[0]
    assert moved["task_above"] > 1e-4
    assert moved["align_below"] > 1e-4
    assert moved["align_above"] == 0


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("layout", ["zero0", "zero2_offload", "zero3"])
def test_joint_steps_in_chunks_are_exact(ranks, settings, layout, steps):
    """Several task micro-batches and several alignment chunks a step, after steps 1, 2 and 3."""
    settings["alignment"]["micro_batch_size"] = 1
    settings["optimizer"] |= {"clip": 0.5, "lr": 1e-3, "steps": steps} | ADAM
    weights, _ = ranks(2).run(run_joint_with_torch_adamw, settings, zero(layout))[0]
    assert relative_error(weights, reference.train(Config.model_validate(settings), layer=2)) < 1e-5


@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_the_shipped_offload_files_are_exact_with_deepspeeds_own_adam(ranks, settings, name):
    settings["optimizer"] |= {"clip": 0.5, "lr": 1e-3} | ADAM
    weights, _ = ranks(2).run(run_steps, settings, read_deepspeed(f"ds_configs/{name}.json"))[0]
    assert relative_error(weights, reference.train(Config.model_validate(settings), layer=2)) < 1e-5


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_gradient_checkpointing_is_exact_and_leaves_nothing_behind(ranks, settings, layout):
    settings["model"]["gradient_checkpointing"] = True
    settings["alignment"]["micro_batch_size"] = 2
    settings["optimizer"] |= {"clip": 0.5, "lr": 1e-3} | ADAM
    weights, left = ranks(2).run(steps_and_module_stack, settings, zero(layout))[0]
    assert relative_error(weights, reference.train(Config.model_validate(settings), layer=2)) < 1e-5
    assert left == 0


def steps_and_module_stack(values: dict, zero: dict):
    from deepspeed.runtime.zero import parameter_offload

    before = len(parameter_offload.FWD_MODULE_STACK)
    weights, _ = run_steps(values, zero)
    return weights, len(parameter_offload.FWD_MODULE_STACK) - before - (zero["zero_optimization"]["stage"] == 3)


def run_joint_with_torch_adamw(values: dict, zero: dict):
    """As `run_steps`, with torch's AdamW also where the optimizer is offloaded: no kernel to compile."""
    from mlalign import sharding

    make = sharding.make_optimizer
    sharding.make_optimizer = lambda config, groups, zero: make(config, groups, {"zero_optimization": {}})
    try:
        return run_steps(values, zero)
    finally:
        sharding.make_optimizer = make
