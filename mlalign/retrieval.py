"""How well translations find each other. Pure functions of embeddings."""

import torch
import torch.nn.functional as F


def accuracy(src: torch.Tensor, tgt: torch.Tensor) -> float:
    """Top-1 retrieval accuracy by cosine: the share of rows of `src` whose nearest row of `tgt` has the same index.

    A tie counts as found only if the right row is the first of the nearest, as in a search.

    Args: src, tgt [sentences, hidden], row n of one translates row n of the other.
    """
    similarity = F.normalize(src.float(), dim=-1) @ F.normalize(tgt.float(), dim=-1).T
    return (similarity.argmax(1) == torch.arange(len(src), device=src.device)).float().mean().item()
