"""What a step sends, with a real engine on two ranks: ZeRO-3's gathers by DeepSpeed's own counters, and reductions."""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlalign.zero import fit_section

STEPS = 6


class Traffic(NamedTuple):
    invalidated: int  #: traces that DeepSpeed threw away
    calls: int  #: of gathers
    elements: int  #: gathered


def traffic(values: dict) -> Traffic:
    """Of the steps after the third."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.runtime.zero import partitioned_param_profiler as profiler

    from mlalign.commands import train
    from mlalign.config import Config

    seen = dict.fromkeys(Traffic._fields, 0)
    invalidate = coordinator.PartitionedParameterCoordinator._invalidate_trace

    def count_invalidation(self) -> None:
        seen["invalidated"] += 1
        invalidate(self)

    def add_up(self) -> None:
        for counter in self.event_counters.values():
            if counter.name.endswith("all_gather"):
                seen["calls"] += counter.count
                seen["elements"] += counter.num_elem
            counter.reset()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinator, "ENABLE_PROFILER", True)
        patch.setattr(coordinator.PartitionedParameterCoordinator, "_invalidate_trace", count_invalidation)
        patch.setattr(profiler.PartitionedParameterProfiler, "reset_events", add_up)
        running = train.real_steps(Config.model_validate(values))
        for _ in range(3):
            next(running)
        torch.distributed.barrier()
        before = dict(seen)
        for _ in range(STEPS):
            next(running)
        after = dict(seen)
    return Traffic(**{name: after[name] - before[name] for name in seen})


def traffic_with_one_trace_for_all(values: dict) -> Traffic:
    """As DeepSpeed does it."""
    from mlalign import sharding

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "keep_a_trace_per_pass", lambda engine: None)
        return traffic(values)


def zero_file(folder: Path, **section: int) -> str:
    """A DeepSpeed file with this ZeRO section."""
    path = folder / "zero.json"
    path.write_text(json.dumps({"zero_optimization": section}))
    return str(path)


@pytest.fixture
def zero3(settings, tmp_path):
    settings["deepspeed"] = zero_file(tmp_path, stage=3, stage3_param_persistence_threshold=0)
    return settings


def only(settings: dict, objective: str) -> dict:
    other, ratio = ("alignment", "1:0") if objective == "task" else ("task", "0:1")
    return settings | {other: None, "interleave": {"ratio": ratio}}


@pytest.mark.parametrize("adapters", ["lora", "full"])
def test_a_joint_step_gathers_what_its_parts_do_and_keeps_its_traces(ranks, zero3, adapters):
    if adapters == "full":
        zero3["lora"] = None
    zero3["task"]["micro_batch_size"] = 4  # one pass of each objective
    joint, task = (ranks(2).run(traffic, values)[0] for values in (zero3, only(zero3, "task")))
    assert joint.invalidated == task.invalidated == 0
    parameters, lower = sizes(zero3)
    assert task.elements == STEPS * parameters  # each once: what the forward gathered, the backward used
    assert joint.elements == task.elements + STEPS * lower
    assert STEPS <= task.calls < joint.calls


def test_deepspeed_still_throws_its_traces_away(ranks, zero3):
    """Where this fails, DeepSpeed has mended it, and `prefetch` can go; or nothing is counted here any more."""
    zero3["task"]["micro_batch_size"] = 4
    found = ranks(2).run(traffic_with_one_trace_for_all, zero3)[0]
    parameters, lower = sizes(zero3)
    assert found.invalidated >= STEPS
    assert found.elements > STEPS * (parameters + lower)
    assert found.calls > 10 * STEPS


def test_what_a_checkpointed_block_computes_again_is_not_gathered_again(ranks, zero3, tmp_path):
    """With adapters, of which every backward has what is frozen at hand."""
    zero3["task"]["micro_batch_size"] = 4
    found = []
    for checkpointing in (False, True):
        zero3["model"]["gradient_checkpointing"] = checkpointing
        path = zero_file(tmp_path, stage=3, stage3_param_persistence_threshold=600)
        found.append(ranks(2).run(traffic, zero3 | {"deepspeed": path})[0])
    assert found[0] == found[1]
    assert found[0].elements > STEPS * sizes(zero3)[1], "base weights are sharded"


def engine_of(values: dict):
    from mlalign.commands import train
    from mlalign.config import Config
    from mlalign.sharding import engine_config
    from mlalign.zero import read_deepspeed

    config = Config.model_validate(values)
    return train._make_engine(config, engine_config(config, read_deepspeed(config.deepspeed)), layer=2)


def hooked(values: dict) -> set[str]:
    """The modules with hooks: DeepSpeed's, and ours at the root."""
    modules = engine_of(values).module.named_modules()
    return {name for name, module in modules if module._forward_pre_hooks or module._forward_hooks}


def generator(values: dict) -> torch.Tensor:
    engine_of(values)
    return torch.get_rng_state()


def test_modules_with_nothing_to_gather_have_no_hooks(ranks, zero3, tmp_path):
    path = zero_file(tmp_path, stage=3, stage3_param_persistence_threshold=600)
    found = ranks(2).run(hooked, zero3 | {"deepspeed": path})[0]
    of_a_block = {name.partition("layers.1.")[2] for name in found if "layers.1" in name}
    sharded = {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert of_a_block == {""} | {f"{name}.base_layer" for name in sharded}, "the block, and what is sharded in it"
    rest = {name.rpartition(".")[2] for name in found if "layers" not in name}
    assert rest == {"", "embed_tokens", "lm_head"}


def second_pass_gathers_ahead(values: dict) -> bool:
    engine = engine_of(values)
    engine.train()
    ids = torch.arange(6)[None]
    task = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "positions": ids[0, :-1], "targets": ids[0, 1:]}
    for _ in range(2):
        engine.backward(engine(task=task), scale_wrt_gas=False)
    return engine.optimizer.parameter_offload.param_coordinator.is_complete_trace()


def test_a_second_pass_gathers_ahead(ranks, zero3):
    assert all(ranks(2).run(second_pass_gathers_ahead, zero3))


def test_what_is_asked_of_a_model_draws_no_random_numbers(ranks, settings, tmp_path):
    """Or dropout would be another under ZeRO-3."""
    drawn = []
    for stage in (2, 3):
        path = zero_file(tmp_path, stage=stage)
        drawn.append(ranks(2).run(generator, settings | {"deepspeed": path})[0])
    assert torch.equal(*drawn)


def test_a_parameter_that_another_module_looks_at_is_noted_for_that(ranks, zero3):
    """peft's LoRA layers ask their sharded A for its type: noted for the whole model, every pass would gather all."""
    found = ranks(2).run(hooked, zero3)[0]
    assert any(name.endswith("q_proj") for name in found)
    assert not any(name.endswith("self_attn") for name in found)


def test_adapters_are_whole_however_large(ranks, zero3, tmp_path):
    zero3["lora"]["r"] = 2048
    found = []
    for section in ({}, {"stage3_param_persistence_threshold": 100_000}):
        zero3["deepspeed"] = zero_file(tmp_path, stage=3, **section)
        found.append(ranks(2).run(traffic, zero3)[0].elements)
    assert found[0] == 0, "nothing here is larger than an adapter"
    assert found[1] > 0, "what the file says holds"


def test_a_section_keeps_what_it_says():
    bucket, whole = "reduce_bucket_size", "stage3_param_persistence_threshold"
    on_nvme = {"stage": 3, "offload_param": {"device": "nvme"}}
    for section in ({"stage": 2}, {"stage": 3, whole: 5}, on_nvme, {"stage": 1, bucket: 10}):
        assert fit_section(section, [200_000], adapters=True) == {bucket: 200_000} | section
    assert fit_section({"stage": 0}, [200_000], adapters=True) == {"stage": 0}
    assert fit_section({"stage": 3}, [10**9, 5], adapters=False) == {"stage": 3, bucket: 500_000_000}
    for sizes, threshold in (([5, 200_000], 200_000), ([5], 100_000)):
        section = {"stage": 3, "offload_param": {"device": "cpu"}}
        fitted = section | {bucket: sum(sizes), whole: threshold}
        assert fit_section(section, sizes, adapters=True) == fitted


def sizes(settings: dict) -> tuple[int, int]:
    """Elements of the whole model with its adapters, and of its first two of four blocks with the embedding."""
    from mlalign import model
    from mlalign.config import Config

    config = Config.model_validate(settings)
    lm = model.load_lm(config.model)
    lm = model.add_lora(lm, config.lora) if config.lora else lm
    aligned = model.AlignedModel(lm, 2, "mean")
    return sum(p.numel() for p in aligned.parameters()), sum(p.numel() for p in aligned._view[0].parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"interleave": {"mode": "alternate"}},
        {"interleave": {"mode": "micro_batch", "micro_batches": 3}},
        {"alignment": {"micro_batch_size": 2}},  # encoded without gradient first
        {"model": {"gradient_checkpointing": True}},
    ],
    ids=["alternate", "micro_batch", "chunks", "checkpointing"],
)
def test_no_interleaving_loses_a_trace(ranks, zero3, changes):
    for section, values in changes.items():
        zero3[section] = zero3.get(section, {}) | values
    found = ranks(2).run(traffic, zero3)[0]
    assert found.invalidated == 0
    assert found.calls >= STEPS
    assert found.elements >= STEPS * sizes(zero3)[1], "no step comes without a pass through the lower blocks"


class _Collectives(TorchDispatchMode):
    """Counts collectives of a kind, by their number of elements."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.found: Counter[int] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and self.kind in function._opname:
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.found[sum(tensor.numel() for tensor in tensors)] += 1
        return function(*args, **(kwargs or {}))


def collectives(values: dict, kind: str) -> dict[int, int]:
    """Of the second step."""
    from mlalign.commands import train
    from mlalign.config import Config

    running = train.real_steps(Config.model_validate(values))
    next(running)
    with _Collectives(kind) as seen:
        next(running)
    return dict(seen.found)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_of_adapters_are_averaged_once_a_step(ranks, settings, tmp_path, stage):
    """However many micro-batches there are: the same collectives as with one of each objective."""
    settings["deepspeed"] = zero_file(tmp_path, stage=stage)
    settings["task"]["micro_batch_size"] = 4
    once = ranks(2).run(collectives, settings, "reduce")[0]
    settings["task"]["micro_batch_size"] = 1
    often = ranks(2).run(collectives, settings, "reduce")[0]
    assert often == once
    assert max(once) > 1000, "no gradient was averaged"


def test_what_is_whole_comes_in_one_collective_a_step(ranks, zero3, tmp_path):
    """DeepSpeed's own gather of it, at a step's end, has one for each tensor."""
    path = zero_file(tmp_path, stage=3, stage3_param_persistence_threshold=10**6)
    found = ranks(2).run(collectives, zero3 | {"deepspeed": path}, "gather")[0]
    parameters, _ = sizes(zero3)
    large = Counter(found) - Counter({size: 1 for size in found if size >= parameters})
    assert large.total() == sum(found.values()) - 1, "all parameters at once, and once"
    assert large.total() <= 4, "pairs, and what they are told apart by"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("adapters", ["lora", "full"])
def test_a_bucket_is_as_large_as_what_is_trained(ranks, settings, tmp_path, stage, adapters):
    path = zero_file(tmp_path, stage=stage)
    if adapters == "full":
        settings["lora"] = None
    for bucket, trained in ranks(2).run(bucket_size, settings | {"deepspeed": path}):
        assert bucket == trained > 0


def bucket_size(values: dict) -> tuple[int, int]:
    """Elements of a bucket of gradients, and of all trained parameters."""
    engine = engine_of(values)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad)
    return engine.optimizer.reduce_bucket_size, trained


def waits(values: dict, timer: bool) -> int:
    """How often DeepSpeed asks to wait for the device in the steps after the third; on CPUs it returns at once."""
    from deepspeed.accelerator import get_accelerator

    from mlalign import sharding
    from mlalign.commands import train
    from mlalign.config import Config

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        if timer:
            patch.setattr(sharding, "_QUIET", {"steps_per_print": 10**9})
        running = train.real_steps(Config.model_validate(values))
        for _ in range(3):
            next(running)
        patch.setattr(type(get_accelerator()), "synchronize", lambda *_: seen.append(None))
        for _ in range(STEPS):
            next(running)
    return len(seen)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_does_not_wait_for_the_device_to_measure_time(ranks, settings, tmp_path, stage):
    path = zero_file(tmp_path, stage=stage)
    assert ranks(2).run(waits, settings | {"deepspeed": path, "log_every": 1000}, False) == [0, 0]


def test_deepspeed_would_wait_to_measure_time(ranks, settings):
    """Or the count above would be of nothing."""
    assert min(ranks(2).run(waits, settings | {"log_every": 1000}, True)) >= STEPS
