"""From token states to one embedding per sentence. Pure functions."""

import torch


def mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of the mask, BOS included, summed in fp32.

    Args: states [rows, tokens, hidden]; mask [rows, tokens], 1 at tokens and 0 at padding.
    Returns: [rows, hidden], fp32.
    """
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(1) / weights.sum(1)


def last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The state of the last token of the mask.

    Args: states [rows, tokens, hidden]; mask [rows, tokens], padding on either side.
    Returns: [rows, hidden], fp32.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    index = (positions * mask).argmax(1)
    return states[torch.arange(len(states), device=states.device), index].float()


POOLERS = {"mean": mean, "last": last}
