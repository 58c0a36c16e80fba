"""Token negative log-likelihood and InfoNCE. Pure functions of tensors on one rank."""

import torch
import torch.nn.functional as F

IGNORED = -100  #: label of a token that is not learned


#: Logits that exist at once in `head_nll`: 128 MiB in fp32.
_LOGITS = 2**25


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(target), in fp32; 0 if there are none.

    Args: logits [learned, vocabulary]; targets [learned], token ids.
    Returns: a scalar, in nats.
    """
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def head_nll(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """`token_nll` of the logits states @ weight.T + bias, a block of rows at a time: at most 128 MiB of them exist.

    The gradient with respect to logits is softmax - onehot, so each block's part of it is known as soon as its loss is:
    nothing is computed twice (as in Liger Kernel, Hsu et al. 2024, section 3.2).

    Args: states [learned, hidden]; weight [vocabulary, hidden]; bias [vocabulary] or None; targets [learned].
    Returns: a scalar, in nats.
    """
    return _HeadNLL.apply(states, weight, bias, targets, torch.is_grad_enabled())


class _HeadNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, targets, with_gradient: bool) -> torch.Tensor:
        wanted = [with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        rows = max(1, _LOGITS // len(weight))
        several = len(states) > rows  # then what the blocks add to is kept in fp32
        ctx.gradients = [
            torch.zeros_like(of, dtype=torch.float32 if several and of is not states else of.dtype) if want else None
            for of, want in zip((states, weight, bias), wanted)
        ]
        of_states, of_weight, of_bias = ctx.gradients
        total = states.new_zeros((), dtype=torch.float32)
        for start in range(0, len(states), rows):
            block, target = states[start : start + rows], targets[start : start + rows, None]
            logits = F.linear(block, weight, bias).float()
            chosen, largest = logits.gather(1, target), logits.amax(1, keepdim=True)
            probabilities = logits.sub_(largest).exp_()  # logsumexp would make a copy of them
            mass = probabilities.sum(1, keepdim=True)
            total += (largest + mass.log() - chosen).sum()
            if not any(wanted):
                continue
            probabilities.div_(mass).scatter_add_(1, target, torch.full_like(mass, -1.0))
            gradient = probabilities.to(states.dtype)
            if of_states is not None:
                torch.mm(gradient, weight, out=of_states[start : start + rows])
            if of_weight is not None:
                of_weight += gradient.T @ block
            if of_bias is not None:
                of_bias += gradient.sum(0)
        ctx.dtypes = [None if of is None else of.dtype for of in (states, weight, bias)]
        return total

    @staticmethod
    def backward(ctx, scale: torch.Tensor):
        gradients = [
            None if gradient is None else gradient.mul_(scale).to(dtype)  # in place: that of a head is large
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes)
        ]
        del ctx.gradients  # or they would live as long as the loss, which the caller may keep
        return *gradients, None, None


def same_text(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Which pairs share a sentence or a row id, and so must not be each other's negatives.

    Args: rows [n, 3] and columns [m, 3], int64: hash of src, hash of tgt, hash of the row id (0 = no id).
    Returns: [n, m], bool. Symmetric, and true for a pair and itself.
    """
    src, tgt, row_id = rows[:, :, None].unbind(1)
    same = (row_id == columns[:, 2]) & (row_id != 0)
    for text in (src, tgt):
        for other in (columns[:, 0], columns[:, 1]):
            same |= text == other
    return same


def info_nce(
    anchors: torch.Tensor, candidates: torch.Tensor, positives: torch.Tensor, temperature: float
) -> torch.Tensor:
    """InfoNCE (van den Oord et al. 2018, eq. 4) with any number of positives per anchor, mean over anchors.

    With s = anchor . candidate / temperature, P the positives and N the rest:
        loss = mean over p in P of -log( exp s_p / (exp s_p + sum over n in N of exp s_n) )
    which is the usual cross entropy if P has one element. Positives are never in each other's denominator.

    Args: anchors [n, hidden] and candidates [m, hidden], of unit length, fp32; positives [n, m], bool, at least one
    in every row.
    Returns: a scalar, in nats.
    """
    similarity = anchors @ candidates.T / temperature
    negatives = similarity.masked_fill(positives, float("-inf")).logsumexp(1, keepdim=True)
    per_positive = F.softplus(negatives - similarity) * positives
    return (per_positive.sum(1) / positives.sum(1)).mean()
