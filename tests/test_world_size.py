"""The result does not depend on the number of ranks or the ZeRO stage: three steps against a plain PyTorch loop."""

from unittest import mock

import pytest
import reference
import torch

from mlalign.config import Config

ADAM = {"eps": 1e-6}  # the default 1e-8 turns rounding of near-zero gradients into whole steps


def run_steps(values: dict, zero: dict) -> tuple[dict[str, torch.Tensor], list[float]]:
    """On one rank of many: the steps of `mlalign train`. Returns all trainable weights, and the gradient norms."""
    from mlalign import checkpoint, model, sharding
    from mlalign.commands import train
    from mlalign.dataset import load_dataset
    from mlalign.loader import Loader
    from mlalign.packing import choose_pad
    from mlalign.tracker import Meter

    config = Config.model_validate(values)
    engine_config = sharding.engine_config(config, zero)
    tokenizer = model.load_tokenizer(config.model)
    dataset = load_dataset(config, tokenizer)
    engine = train._make_engine(config, engine_config, layer=2)
    engine.train()
    steps, norms = config.optimizer.steps, []
    loader = Loader(config, dataset.orders, choose_pad(engine, config.model, tokenizer), end=steps)
    for _ in range(steps):
        with_task = train._backward(engine, config, loader.take(), Meter())
        norms.append(train._optimizer_step(engine, config.optimizer.lr, with_task, measure=True))
    weights = checkpoint._gathered(engine.module.lm, trainable_only=True)
    engine.destroy()
    return weights, norms


def relative_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    difference = sum((found[name].double() - wanted[name].double()).square().sum() for name in wanted)
    return float((difference / sum(weight.double().square().sum() for weight in wanted.values())).sqrt())


def gradient_of_gathered_rows(strided: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """On one rank of many: the gradient of its rows where rank r has r + 1 times their numbers; and what it must be."""
    from mlalign import distributed

    size, rank = distributed.world_size(), distributed.rank()
    numbers = torch.arange(24.0 * size).view(2, 3 * size, 4)
    own = torch.zeros(2, 3, 4, requires_grad=True)
    every = distributed.gather_rows_with_grad(own.transpose(0, 1)).transpose(0, 1)
    (every * numbers * (rank + 1)).sum().backward()
    if strided:
        torch.distributed.all_reduce(numbers.transpose(0, 1))
    return own.grad, numbers[:, 3 * rank : 3 * rank + 3] * sum(range(1, size + 1))


def test_gathered_rows_get_the_gradients_of_all_ranks(ranks):
    for found, wanted in ranks(2).run(gradient_of_gathered_rows, False):
        assert torch.equal(found, wanted)


def test_a_collective_of_a_tensor_with_strides_is_refused_here(ranks):
    """Every test on ranks would notice what NCCL would take for other numbers."""
    with pytest.raises(AssertionError, match="all_reduce of a tensor not in row order"):
        ranks(2).run(gradient_of_gathered_rows, True)


@pytest.fixture(scope="module")
def references() -> dict:
    return {}


@pytest.mark.parametrize("adapters", ["lora", "full"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_three_steps_equal_the_plain_loop(ranks, settings, references, size, stage, adapters):
    settings["optimizer"] |= {"clip": 0.5, "lr": 1e-3} | ADAM
    if adapters == "full":
        settings["lora"] = None
    if adapters not in references:
        references[adapters] = reference.train(Config.model_validate(settings), layer=2)
    weights, norms = ranks(size).run(run_steps, settings, {"zero_optimization": {"stage": stage}})[0]
    assert relative_error(weights, references[adapters]) < 1e-5
    assert min(norms) > 0.5, "clipping was not tried"


def test_the_steps_compared_above_move_the_weights(settings):
    settings["optimizer"] |= {"clip": 0.5, "lr": 1e-3} | ADAM
    after = reference.train(Config.model_validate(settings), layer=2)
    settings["optimizer"]["lr"] = 1e-30
    assert relative_error(reference.train(Config.model_validate(settings), layer=2), after) > 1e-2


@pytest.mark.parametrize(
    ("adapters", "threshold", "checkpointing"),
    [
        ("full", 0, False),
        ("all-linear", 0, False),
        ("all-linear", 600, False),
        ("all-linear", 600, True),
        (["q_proj", "embed_tokens"], 600, False),
        (["q_proj", "embed_tokens"], 0, True),
    ],
)
def test_steps_of_sharded_weights_equal_the_plain_loop(ranks, settings, adapters, threshold, checkpointing):
    """ZeRO-3 keeps small tensors whole, and here all are small: 0 shards all, 600 what is frozen."""
    settings["optimizer"] |= {"clip": 0.5, "lr": 1e-3} | ADAM
    settings["model"]["gradient_checkpointing"] = checkpointing
    settings["alignment"]["micro_batch_size"] = 2  # in chunks: encoded twice
    settings["lora"] = None if adapters == "full" else {"dropout": 0.0, "target_modules": adapters}
    wanted = reference.train(Config.model_validate(settings), layer=2)
    zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": threshold}}
    weights, _ = ranks(2).run(run_steps, settings, zero)[0]
    assert relative_error(weights, wanted) < 1e-5


def test_steps_with_a_second_copy_of_shards_equal_the_plain_loop(ranks, settings):
    """ZeRO++'s hpZ, by which every host has all shards; here two ranks stand for a host."""
    settings["optimizer"] |= {"clip": 0.5, "lr": 1e-3} | ADAM
    wanted = reference.train(Config.model_validate(settings), layer=2)
    section = {"stage": 3, "stage3_param_persistence_threshold": 600, "zero_hpz_partition_size": 2}
    weights, _ = ranks(4).run(run_steps, settings, {"zero_optimization": section})[0]
    assert relative_error(weights, wanted) < 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_packed_steps_equal_the_plain_loop(ranks, settings, stage):
    settings["optimizer"] |= {"clip": 0.5, "lr": 1e-3} | ADAM
    settings["model"]["packing"] = True
    settings["alignment"]["micro_batch_size"] = 2  # in chunks: encoded twice
    wanted = reference.train(Config.model_validate(settings), layer=2)
    weights, _ = ranks(2).run(run_steps, settings, {"zero_optimization": {"stage": stage}})[0]
    assert relative_error(weights, wanted) < 1e-5


def run_packed_by_torch(values: dict, zero: dict, refused: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
    """`run_steps` on one rank of many, as if torch's flash attention ran on CPUs; or raised within a pass."""
    from test_packing import kernel

    from mlalign import varlen

    patch = mock.patch.object
    with patch(varlen, "serves", lambda *_: True), patch(varlen, "wrong_kernel", lambda *_: ""):
        with patch(varlen, "varlen_attn", mock.Mock(side_effect=NotImplementedError) if refused else kernel):
            return run_steps(values, zero)


@pytest.mark.parametrize("refused", [False, True], ids=["served", "refused"])
@pytest.mark.parametrize("stage", [2, 3])
def test_steps_by_torchs_flash_attention_equal_the_plain_loop(ranks, settings, stage, refused):
    settings["optimizer"] |= {"clip": 0.5, "lr": 1e-3} | ADAM
    wanted = reference.train(Config.model_validate(settings), layer=2)
    zero = {"zero_optimization": {"stage": stage}}
    weights, _ = ranks(2).run(run_packed_by_torch, settings, zero, refused)[0]
    assert relative_error(weights, wanted) < 1e-5
