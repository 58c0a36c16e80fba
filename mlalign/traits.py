"""What a model computes, found out by running it rather than by its architecture's name.

Under ZeRO-3 all ranks call these.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@torch.no_grad()
def is_causal(decoder: nn.Module) -> bool:
    """Whether no token's state depends on later ones: then padding on the right needs no mask, because nothing sees it.

    Two rows that begin alike are compared to the last bit, without a mask and with one, because a model may look ahead
    with only one of the two. Without a mask attention takes half the work, and sdpa its fast kernels on GPUs.
    """
    device = next(decoder.parameters()).device
    begin, ends = [1, 2, 3, 4], [[5, 6, 7, 8], [9, 8, 7, 6]]
    ids = torch.tensor([begin + end for end in ends], device=device)
    mask = torch.ones_like(ids)
    mask[1, -1] = 0
    try:
        with _evaluating(decoder):
            every = [decoder(input_ids=ids, attention_mask=each, use_cache=False) for each in (None, mask)]
    except (TypeError, ValueError, AttributeError):  # a model that needs a mask
        return False
    begun = [states.last_hidden_state[:, : len(begin)] for states in every]
    return all(torch.equal(states[0], states[1]) for states in begun)


@torch.no_grad()
def is_plain(lm: nn.Module, decoder: nn.Module) -> bool:
    """Whether the model's logits are its head's output on the decoder's states, with nothing else done to either.

    Some architectures scale states or logits, or cap them. What goes into the head is compared with what comes out of
    the decoder, and its output is replaced by a value that no cap or scale leaves unchanged.
    """
    head, device = lm.get_output_embeddings(), next(lm.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    seen = []

    def note(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        seen.append(arguments[0])
        return torch.full_like(output, 1000.0)

    hook = head.register_forward_hook(note)
    try:
        with _evaluating(lm):
            logits = lm(**inputs).logits
            states = decoder(**inputs).last_hidden_state
    finally:
        hook.remove()
    return len(seen) == 1 and torch.equal(seen[0], states) and bool((logits == 1000).all())


@torch.no_grad()
def chooses_logits(lm: nn.Module) -> bool:
    """Whether a model asked for the logits of some tokens, by a mask over all, returns them: [tokens, vocabulary].

    transformers' own architectures do, by `slice_logits_to_keep`.
    """
    device = next(lm.parameters()).device
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device)
    mask = torch.tensor([[True, False, True], [False, False, True]], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with _evaluating(lm):
        every = lm(**inputs).logits[mask]
        try:
            chosen = lm(**inputs, logits_to_keep=mask).logits
        except (TypeError, ValueError, IndexError):  # it does not know the argument
            return False
    return chosen.shape == every.shape and bool((chosen - every).norm() < 0.02 * every.norm())  # bf16 rounds by 0.004


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
