"""ZeRO-3: every kind of pass prefetches by its own trace.

DeepSpeed traces the order of modules in one pass, forward and backward, and gathers parameters ahead by it in the next.
A pass in another order makes it throw its trace away. Task and alignment passes take turns, so it would never prefetch,
and would gather every parameter twice a pass and one at a time.
"""

import copy
from typing import Any

import torch


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
