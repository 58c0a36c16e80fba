"""The method on one screen: what one optimizer step computes, exactly, on any number of ranks.

DeepSpeed averages gradients over the ranks. The factors here make the averaged gradient that of

    task loss       sum of token NLL over the global task batch / number of its learned tokens
    alignment loss  InfoNCE over the global alignment batch, every pair against every other

Each `engine.backward` follows exactly one `engine(...)`, or ZeRO-3 overwrites gradients instead of adding them up; task
batches come first in a step, see `schedule.batches`. Gradients are averaged once a step, see `one_reduction`. With
DeepSpeed's accumulation boundary set by hand, ZeRO-1 and 2 with an offloaded optimizer would forget what the last
backward did not reach.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_local_grad, safe_set_full_grad, safe_set_local_grad
from torch.utils.checkpoint import checkpoint

from mlalign.config import Alignment
from mlalign.distributed import gather_rows, gather_rows_with_grad, rank, uses_cuda, world_size
from mlalign.loss import info_nce, same_text

Passes = list[dict[str, torch.Tensor]]

FEW_CHUNKS = 8  #: of an alignment batch: up to this number the last is encoded once, see `_align_in_chunks`

_SIMILARITIES = 2**20  #: that exist at once in `contrast`, in each of a few matrices of 4 MiB,
_ROWS = 64  #: but for at least this number of rows: products of few rows with very many columns are bound by memory


class BitextChunk(NamedTuple):
    """This rank's share of one alignment micro-batch."""

    passes: Passes  #: see `collate.collate_bitext`
    keys: torch.Tensor  #: [pairs, 3], see `collate.pair_keys`


@contextmanager
def one_reduction(engine) -> Iterator[None]:
    """Around all backward passes of a step: gradients are averaged over the ranks at its end, once.

    ZeRO-0 and 1 do so by themselves, in `engine.step()`. ZeRO-2 and 3 average after each backward, to keep only a shard
    of what would not fit whole: in full fine-tuning they still do. Gradients of adapters are small, and wait.
    """
    if not engine.managed_gradient_accumulation():
        yield
        return
    with engine.coalesce_grad_reduction():
        try:
            yield
        except BaseException:
            # DeepSpeed would average here too, and wait for ranks that did not fail: what failed would never be said.
            engine._flush_coalesced_reduction_zero12 = engine._flush_coalesced_reduction_zero3 = lambda _: None
            raise


def task_backward(
    engine, micro_batches: list[dict[str, torch.Tensor]], global_tokens: int, weight: float
) -> torch.Tensor:
    """Forward and backward of one task batch; the same number of micro-batches on every rank.

    Args: global_tokens: learned tokens of the whole batch, over all ranks.
    Returns: this rank's share of the task loss, detached: the sum over ranks is the loss.
    """
    loss = torch.zeros((), device=engine.device)
    for micro_batch in micro_batches:
        nll = engine(task=micro_batch)
        engine.backward(_sound(nll) * (weight * world_size() / global_tokens), scale_wrt_gas=False)
        loss += nll.detach() / global_tokens
    return loss


def align_backward(engine, chunks: list[BitextChunk], settings: Alignment, weight: float) -> torch.Tensor:
    """Forward and backward of one alignment batch; the same number of pairs in every chunk on every rank.

    Returns: this rank's share of the alignment loss, detached: the mean over ranks is the loss.
    """
    if settings.negatives == "local":
        return _align_locally(engine, chunks, settings, weight)
    if len(chunks) == 1:
        loss = alignment_loss(engine(bitext=chunks[0].passes), chunks[0].keys, settings)
        engine.backward(_sound(loss) * weight, scale_wrt_gas=False)
        return loss.detach()
    return _align_in_chunks(engine, chunks, settings, weight)


def _sound(loss: torch.Tensor) -> torch.Tensor:
    """Give a loss that is not finite a gradient that is not, which skips the step; without waiting for the GPU."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def _align_locally(engine, chunks: list[BitextChunk], settings: Alignment, weight: float) -> torch.Tensor:
    """Every micro-batch of every rank is a contrastive batch of its own, as in the authors' code."""
    total = torch.zeros((), device=engine.device)
    pairs = sum(len(chunk.keys) for chunk in chunks)
    for chunk in chunks:
        loss = alignment_loss(engine(bitext=chunk.passes), chunk.keys, settings) * (len(chunk.keys) / pairs)
        engine.backward(_sound(loss) * weight, scale_wrt_gas=False)
        total += loss.detach()
    return total


def _align_in_chunks(engine, chunks: list[BitextChunk], settings: Alignment, weight: float) -> torch.Tensor:
    """The loss of the whole batch at the activation memory of one chunk, exactly (GradCache, Gao et al. 2021).

    Encode without graph, take the loss's gradient with respect to the embeddings, then encode each chunk again and
    carry its part of that gradient back. Both encodings of a chunk start from the same random state: with different
    dropout masks the gradient is plainly wrong (relative error 0.8 at LoRA dropout 0.1). If there are few chunks, the
    last keeps its graph while the loss is taken, and is encoded once; with many this would save little, and the loss
    takes memory.
    """
    once = chunks[-1:] if len(chunks) <= FEW_CHUNKS else []
    twice, states, embeddings = chunks[: len(chunks) - len(once)], [], []
    with torch.no_grad():
        for chunk in twice:
            states.append(random_state())
            embeddings.append(engine(bitext=chunk.passes))
    embeddings += [engine(bitext=chunk.passes) for chunk in once]
    whole = torch.cat([each.detach() for each in embeddings], dim=1).requires_grad_()
    loss = alignment_loss(whole, torch.cat([chunk.keys for chunk in chunks]), settings)
    (gradient,) = torch.autograd.grad(_sound(loss) * weight, whole)
    parts = list(gradient.split([len(chunk.keys) for chunk in chunks], dim=1))
    if once:
        engine.backward((embeddings.pop() * parts.pop()).sum(), scale_wrt_gas=False)
    drawn = random_state()
    for chunk, state, part in zip(twice, states, parts):
        set_random_state(state)
        engine.backward((engine(bitext=chunk.passes) * part).sum(), scale_wrt_gas=False)
    set_random_state(drawn)  # or the next pass would reuse the dropout masks of one of these
    return loss.detach()


def alignment_loss(embeddings: torch.Tensor, keys: torch.Tensor, settings: Alignment) -> torch.Tensor:
    """InfoNCE of this rank's rows against the columns of all ranks (of this rank, with local negatives).

    With an autograd gather whose backward sums over ranks, the average of these losses over the ranks is the loss of
    the whole batch, and so is their gradient: no factor is needed.

    Args: embeddings [2, pairs, hidden], src first; keys [pairs, 3]. Returns: a scalar.
    """
    rows = F.normalize(embeddings.float(), dim=-1)
    columns, column_keys, offset = rows, keys, 0
    if settings.negatives == "global":
        columns = gather_rows_with_grad(rows.transpose(0, 1)).transpose(0, 1)
        column_keys, offset = gather_rows(keys), rank() * len(keys)
    return contrast(rows, columns, keys, column_keys, offset, settings)


def contrast(
    rows: torch.Tensor,
    columns: torch.Tensor,
    keys: torch.Tensor,
    column_keys: torch.Tensor,
    offset: int,
    settings: Alignment,
) -> torch.Tensor:
    """InfoNCE of rows against columns, in the directions and with the positives of `settings`.

    Similarities are computed a block of rows at a time, and again for the backward pass if there are several blocks:
    memory is linear in rows and columns, and what is computed twice is little compared with an encoding.

    Args: rows [2, pairs, hidden] and columns [2, candidates, hidden], of unit length, src first; keys [pairs, 3] and
    column_keys [candidates, 3]; offset: the column of the first row. Returns: a scalar.
    """
    size = max(_ROWS, _SIMILARITIES // len(column_keys))
    if len(keys) <= size:
        return _contrast_block(rows, columns, keys, column_keys, offset, settings)
    total = rows.new_zeros(())
    for start in range(0, len(keys), size):
        block = slice(start, start + size)
        total = total + len(keys[block]) * checkpoint(
            _contrast_block,
            *(rows[:, block], columns, keys[block], column_keys, offset + start, settings),
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total / len(keys)


def _contrast_block(rows, columns, keys, column_keys, offset: int, settings: Alignment) -> torch.Tensor:
    positives = torch.zeros(len(keys), len(column_keys), dtype=torch.bool, device=keys.device)
    positives.diagonal(offset).fill_(True)
    if settings.positives == "id":
        positives |= same_text(keys, column_keys)
    loss = info_nce(rows[0], columns[1], positives, settings.temperature)
    if settings.infonce == "symmetric":
        loss = (loss + info_nce(rows[1], columns[0], positives, settings.temperature)) / 2
    return loss


def rest_untouched(engine) -> None:
    """Between the last backward and the step, if no task batch ran: zero the gradients of what no pass reached.

    ZeRO-3, and ZeRO-1 and 2 with an offloaded optimizer, would apply the previous step's gradient to them again. The
    other layouts start every step from zero.
    """
    if engine.zero_optimization_stage() < 3 and not engine.zero_cpu_offload():
        return
    for parameter in engine.module.above():
        if engine.zero_optimization_stage() == 3:
            safe_set_local_grad(parameter, torch.zeros_like(safe_get_local_grad(parameter)))
        else:
            safe_set_full_grad(parameter, torch.zeros_like(parameter, dtype=torch.float32))


def random_state() -> tuple[torch.Tensor, ...]:
    """The state of the generators that dropout draws from: CPU, and this rank's GPU."""
    cuda = (torch.cuda.get_rng_state(),) if uses_cuda() else ()
    return (torch.get_rng_state(), *cuda)


def set_random_state(state: Sequence[torch.Tensor]) -> None:
    """Put the generators back to the state that `random_state` returned."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
