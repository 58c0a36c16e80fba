"""The LM head where tokens are learned, and nowhere else: no logits of prompts and padding, and few at a time.

`fuse_head(lm)` gives an LM head that returns the loss. It stays the module that it is, called as one, so that DeepSpeed
gathers its weight and hooks see it; what a checkpoint holds is the same.
"""

import torch
from torch import nn

from mlalign.loss import head_nll


def fuse_head(lm: nn.Module) -> bool:
    """Teach the LM head of a causal LM to return `head_nll` when it is called with `targets`.

    Returns: whether it can: the head must be a plain Linear. Ask `traits.is_plain` before relying on it.
    """
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    usual = head.forward

    def forward(states: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        return usual(states) if targets is None else head_nll(states, head.weight, head.bias, targets)

    head.forward = forward
    return True
