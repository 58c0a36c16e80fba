"""The DeepSpeed engine around the model: its config, its optimizer, and what needs doing by hand around a step."""

import math
from typing import Any

import torch
from torch import nn

from mlalign import distributed, kernels
from mlalign.compiling import check_compile
from mlalign.config import Config, Model
from mlalign.model import AlignedModel, decoder_parts, precision_dtype
from mlalign.prefetch import find_foreign_parameters, keep_a_trace_per_pass, unhook_whole_modules
from mlalign.resharding import masters_without_zero
from mlalign.zero import offloads_optimizer, stage

#: DeepSpeed's own report, and its timer, which would wait for the GPU at every forward.
_QUIET = {"steps_per_print": 10**9, "timers": {"throughput": {"enabled": False}}}


def engine_config(config: Config, zero: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's config: ZeRO and communication from the user's file, the rest from ours.

    DeepSpeed is told one micro-batch per step, because `objectives` does the accumulation.
    """
    if config.model.compile:
        check_compile(zero)
    reduces_in_backward = stage(zero) >= 2  # then `objectives.one_reduction` makes DeepSpeed wait
    return zero | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": reduces_in_backward and config.lora is not None,
        "gradient_clipping": config.optimizer.clip,
        "bf16": {"enabled": precision_dtype(config.model.precision) == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        **_QUIET,
    }


def parameter_groups(model: AlignedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: reached by alignment or above it, times matrix (decayed) or vector (not).

    The groups with `above` rest in steps without a task batch, in which AdamW would move them by its momentum alone.
    """
    above = {id(p) for p in model.above()}
    groups: dict[tuple[bool, bool], list] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2  # ds_shape: whole, where ZeRO-3 shards
            groups.setdefault((id(parameter) in above, matrix), []).append(parameter)
    return [
        {"params": parameters, "above": is_above, "weight_decay": weight_decay if matrix else 0.0}
        for (is_above, matrix), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def make_optimizer(config: Config, groups: list[dict[str, Any]], zero: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW; DeepSpeed's CPU kernel if the optimizer is offloaded, which ZeRO demands."""
    settings = config.optimizer
    arguments = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if offloads_optimizer(zero):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        kernels.load("CPUAdamBuilder")
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
    return torch.optim.AdamW(groups, fused=distributed.uses_cuda(), **arguments)


def set_lr(optimizer, lr: float, rest_above: bool) -> None:
    """Set every group's learning rate: `lr`, but 0 above the layer if this step must leave that alone."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if rest_above and group["above"] else lr


def make_engine(model: AlignedModel, optimizer: torch.optim.Optimizer, deepspeed_config: dict[str, Any]):
    """Wrap the model in a DeepSpeed engine."""
    import deepspeed

    clip = deepspeed_config["gradient_clipping"]
    plain = stage(deepspeed_config) == 0 and not deepspeed_config["bf16"]["enabled"]
    if plain:
        deepspeed_config = deepspeed_config | {"gradient_clipping": 0.0}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
    _forget_first_update(engine)
    find_foreign_parameters(engine)
    model.ask()
    decoder, stack, _ = decoder_parts(model.lm)
    unhook_whole_modules(engine, getattr(decoder, stack))
    keep_a_trace_per_pass(engine)
    if plain:
        # Without ZeRO the engine clips but keeps no norm: do both between its reduction and the optimizer's step.
        parameters = [p for p in model.parameters() if p.requires_grad]

        def clip_and_keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            engine.plain_grad_norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
            if not engine.plain_grad_norm.isfinite():  # as ZeRO does: no update
                for parameter in parameters:
                    parameter.grad = None

        optimizer.register_step_pre_hook(clip_and_keep)
    return engine


def _forget_first_update(engine) -> None:
    """Undo the update by which DeepSpeed creates Adam's state in bf16 without ZeRO: it decays, and counts as a step."""
    for parameter, master in masters_without_zero(engine):
        master.data.copy_(parameter.data)
        engine.basic_optimizer.state.pop(master, None)


def inference_config(settings: Model, zero: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's config for forward passes only."""
    bf16 = precision_dtype(settings.precision) == torch.bfloat16
    return zero | {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": bf16}, **_QUIET}


def inference_engine(module: nn.Module, deepspeed_config: dict[str, Any]):
    """Shard a module over the ranks by ZeRO-3, for forward passes only."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=module, config=deepspeed_config)
    engine.eval()
    return engine


def forget_modules(engine) -> None:
    """After a step: drop what ZeRO-3 keeps of modules whose forward gradient checkpointing ended early.

    DeepSpeed pushes a module onto a list before its forward and pops it after; recomputation stops in between, so the
    list would grow with every step.
    """
    if engine.zero_optimization_stage() == 3:
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        del FWD_MODULE_STACK[FWD_MODULE_STACK.index(engine.module) + 1 :]


def step_was_taken(engine) -> bool:
    """Whether the last step changed anything: it does not if the gradient is not finite. The same on all ranks."""
    norm = getattr(engine, "plain_grad_norm", None)
    return engine.was_step_applied() if norm is None else bool(norm.isfinite())


def grad_norm(engine) -> float:
    """The global gradient norm of the last step, before clipping."""
    norm = getattr(engine, "plain_grad_norm", None)
    return float(engine.get_global_grad_norm() if norm is None else norm)
