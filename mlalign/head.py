"""The LM head where tokens are learned, and nowhere else: no logits of prompts and padding, and few at a time.

`fuse_head(lm)` gives an LM head that returns the loss. It stays the module that it is, called as one, so that DeepSpeed
gathers its weight and hooks see it; what a checkpoint holds is the same.
"""

import torch
from torch import nn

from mlalign.loss import head_nll


def fuse_head(lm: nn.Module) -> bool:
    """Teach the LM head of a causal LM to return `head_nll` when it is called with `targets`.

    Returns: whether it can: the head must be a plain Linear. Call `is_plain` before relying on it.
    """
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    usual = head.forward

    def forward(states: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        return usual(states) if targets is None else head_nll(states, head.weight, head.bias, targets)

    head.forward = forward
    return True


@torch.no_grad()
def is_plain(lm: nn.Module, decoder: nn.Module) -> bool:
    """Whether the model's logits are its head's output on the decoder's states, and nothing else is done to either.

    Some architectures scale states or logits, or cap them. What goes into the head is compared with what comes out of
    the decoder, and for its output a value is put that no cap or scale leaves as it is. On ZeRO-3 all ranks call it.
    """
    head, device = lm.get_output_embeddings(), next(lm.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    seen = []

    def note(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        seen.append(arguments[0])
        return torch.full_like(output, 1000.0)

    training = lm.training
    lm.eval()
    hook = head.register_forward_hook(note)
    try:
        logits = lm(**inputs).logits
        states = decoder(**inputs).last_hidden_state
    finally:
        hook.remove()
        lm.train(training)
    return len(seen) == 1 and torch.equal(seen[0], states) and bool((logits == 1000).all())
