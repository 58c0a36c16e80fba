"""ZeRO-3's hooks: every kind of pass gathers ahead by its own trace, and modules with nothing to gather have no hooks.

DeepSpeed traces the order of modules in one pass, forward and backward, and gathers parameters ahead by it in the next.
A pass in another order makes it throw its trace away. Task and alignment passes take turns, so it would never prefetch,
and would gather every parameter twice a pass and one at a time.
"""

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_torchs_linear = F.linear  #: which DeepSpeed replaces for good when it first shards a model


def keep_a_trace_per_pass(engine) -> None:
    """Give each kind of pass of an `AlignedModel` a coordinator of its own. Call it before the first pass.

    The kinds are the task, and bitext by its number of passes, each with and without gradient. Coordinators share what
    is gathered or on its way, and nothing else, so they can take turns. With a DeepSpeed that is built differently from
    0.19, nothing is changed: the step is then slower, and as exact.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    unused = getattr(offload, "param_coordinator", None)
    if not hasattr(unused, "_clear_trace_structures"):
        return
    coordinators: dict[tuple[int, bool], Any] = {}

    def choose(module, args: tuple, kwargs: dict[str, Any]) -> None:
        kind = len(kwargs.get("bitext") or ()), torch.is_grad_enabled()
        if kind not in coordinators:
            coordinators[kind] = copy.copy(unused)
            coordinators[kind]._clear_trace_structures()
        offload.param_coordinator = coordinators[kind]

    engine.module.register_forward_pre_hook(choose, with_kwargs=True, prepend=True)  # DeepSpeed's begins the pass


@torch.no_grad()
def find_foreign_parameters(engine) -> None:
    """Run a pass, in which ZeRO-3 notes parameters that a module uses without calling the module they are of.

    Such are the halves of an adapter of embeddings. DeepSpeed looks for them only while the engine itself is called,
    and from then on gathers them with the module that uses them, whoever calls it. All ranks call this, before anything
    else runs a part of the model.
    """
    if engine.zero_optimization_stage() < 3:
        return
    ids = torch.zeros(1, 2, dtype=torch.int64, device=engine.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "positions": ids[0, :1], "targets": ids[0, :1]}
    training = engine.module.training
    engine.eval()
    engine(task=inputs)
    engine.train(training)
    coordinator = engine.optimizer.parameter_offload.param_coordinator
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()  # of this pass: real ones have fewer hooks, and a trace of their own


def unhook_whole_modules(engine, blocks: nn.ModuleList) -> None:
    """Take DeepSpeed's hooks off modules that have nothing to gather: most of what LoRA brings, and containers.

    DeepSpeed hooks every module four times, whether it has parameters or keeps them whole (those below
    `stage3_param_persistence_threshold`), and computes every Linear in a way that bears its weight's coming and going.
    With adapters of all linear layers this is half of what Python does in a step, and a GPU waits for it.
    Blocks keep their hooks, for what a checkpointed block computes again is released with it. All ranks call it, after
    `find_foreign_parameters`.
    """
    if engine.zero_optimization_stage() < 3:
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
    from deepspeed.utils import z3_leaf_module

    offload, whole = engine.optimizer.parameter_offload, engine.optimizer.persistent_parameters
    keep = {id(engine.module), *map(id, blocks)}
    hooked, theirs = [*offload.forward_hooks, *offload.backward_hooks], set()
    for module in engine.module.modules():
        parameters = list(iter_params(module, recurse=z3_leaf_module(module)))
        if id(module) in keep or not all(parameter.ds_persist for parameter in parameters):
            continue
        theirs |= {id(module._forward_pre_hooks), id(module._forward_hooks)}
        if type(module) is nn.Linear and "forward" not in vars(module):  # as that of a fused head is
            module.forward = partial(_linear, module)
    for handle in hooked:
        if id(handle.hooks_dict_ref()) in theirs:
            handle.remove()

    def gather_whole(*_: Any) -> None:
        """Gather those that are not: before the first pass, after every step, and where weights were read."""
        absent = [parameter for parameter in whole if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if any(hasattr(p.ds_tensor, "ds_quant_scale") or p.ds_secondary_tensor is not None for p in absent):
            absent[0].all_gather(absent)  # ZeRO++: of which each may have another kind of shards
        elif absent:
            absent[0].all_gather_coalesced(absent).wait()

    engine.optimizer.persistent_parameters = []  # or a step would gather them at its end, with a collective for each
    engine.module.register_forward_pre_hook(gather_whole, prepend=True)  # DeepSpeed's begins to gather ahead


def _linear(module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return _torchs_linear(input, module.weight, module.bias)
