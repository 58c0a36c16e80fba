"""What would spoil a run without a word: looked for at log steps, by all ranks alike."""

import math
from pathlib import Path

import torch
from torch import nn

from mlalign.distributed import gather_rows, world_size
from mlalign.errors import UserError


def refuse_non_finite(values: dict[str, float], step: int, run_dir: Path) -> None:
    """Raise UserError where a loss or the gradient is no number any more; `values` are the same on all ranks."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"{bad[0]} is {values[bad[0]]} after step {step}: try a lower optimizer.lr or a longer warmup; "
            f"{run_dir / 'checkpoints'} holds what was saved before"
        )


def refuse_diverged(lm: nn.Module, step: int, run_dir: Path) -> None:
    """Raise UserError where a rank's copy of the trained weights is not rank 0's, to the last bit.

    Copies get the same gradients and start alike, so that only a fault of memory, network or software parts them. Under
    ZeRO-3 there are no copies.
    """
    copies = [(name, p) for name, p in lm.named_parameters() if p.requires_grad and not hasattr(p, "ds_id")]
    if not copies or world_size() == 1:
        return
    own = torch.stack([torch.hash_tensor(p.detach()) for _, p in copies]).view(torch.int64)
    every = gather_rows(own[None])
    differing = (every != every[0]).nonzero()
    if len(differing):
        rank, first = differing[0].tolist()
        raise UserError(
            f"after step {step} rank {rank} has other weights than rank 0, in {copies[first][0]} first: memory or "
            f"network of its host may be at fault; {run_dir / 'checkpoints'} holds what was saved before"
        )
