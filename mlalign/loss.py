"""Token negative log-likelihood and InfoNCE. Pure functions of tensors on one rank."""

import torch
import torch.nn.functional as F

IGNORED = -100  #: label of a token that is not learned


def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(token) over the learned tokens, in fp32; 0 where there are none.

    Args: logits [rows, tokens, vocabulary], position t predicts token t + 1; labels [rows, tokens], `IGNORED` where a
    token is not learned.
    Returns: a scalar, in nats.
    """
    targets = labels[:, 1:]
    learned = targets != IGNORED
    return F.cross_entropy(logits[:, :-1][learned].float(), targets[learned], reduction="sum")


def same_text(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Which pairs share a sentence or a row id, and so must not be each other's negatives.

    Args: rows [n, 3] and columns [m, 3], int64: hash of src, hash of tgt, hash of the row id (0 = no id).
    Returns: [n, m], bool. Symmetric, and true for a pair and itself.
    """
    rows, columns = rows[:, None], columns[None]
    text = (rows[..., :2, None] == columns[..., None, :2]).any(-1).any(-1)
    return text | ((rows[..., 2] == columns[..., 2]) & (rows[..., 2] != 0))


def info_nce(
    anchors: torch.Tensor, candidates: torch.Tensor, positives: torch.Tensor, temperature: float
) -> torch.Tensor:
    """InfoNCE (van den Oord et al. 2018, eq. 4) with any number of positives per anchor, mean over anchors.

    With s = anchor . candidate / temperature, P the positives and N the rest:
        loss = mean over p in P of -log( exp s_p / (exp s_p + sum over n in N of exp s_n) )
    which is the usual cross entropy where P has one element. Positives never stand in each other's denominator.

    Args: anchors [n, hidden] and candidates [m, hidden], of unit length, fp32; positives [n, m], bool, at least one
    in every row.
    Returns: a scalar, in nats.
    """
    similarity = anchors @ candidates.T / temperature
    negatives = similarity.masked_fill(positives, float("-inf")).logsumexp(1, keepdim=True)
    per_positive = F.softplus(negatives - similarity) * positives
    return (per_positive.sum(1) / positives.sum(1)).mean()
