"""Losses and retrieval accuracy on dev, the same on any number of ranks. Used by `mlalign train` between steps."""

from collections.abc import Callable, Sequence

import torch

from mlalign import distributed, retrieval
from mlalign.collate import collate_bitext, collate_task, pair_keys, pass_sizes
from mlalign.config import Config
from mlalign.examples import Pair, TaskExample
from mlalign.objectives import alignment_loss
from mlalign.sampler import slices


def evaluate(
    engine,
    config: Config,
    task: Sequence[TaskExample],
    bitext: Sequence[Pair],
    pad: int | None,
    stop: Callable[[], bool],
) -> dict[str, float] | None:
    """`dev/task_loss`, `dev/alignment_loss`, `dev/retrieval_accuracy`: what there is data for. Called by all ranks.

    `stop` is asked before each micro-batch, and answers the same on all ranks; where it says yes the result is None.
    """
    engine.eval()
    values = {}
    try:
        with torch.no_grad():
            if task:
                values["dev/task_loss"] = task_loss(engine, task, config.task.micro_batch_size, pad, stop)
            if bitext:
                embeddings, pairs = embed_pairs(engine, bitext, config.alignment.micro_batch_size, pad, stop)
                values["dev/alignment_loss"] = _alignment_loss(embeddings, pairs, config)
                values["dev/retrieval_accuracy"] = _retrieval_accuracy(embeddings, pairs)
    except _StoppedError:
        return None
    finally:
        engine.train()
    return distributed.broadcast_object(values)  # what follows from them is decided alike, to the last bit


class _StoppedError(Exception):
    """An evaluation was asked to stop."""


def task_loss(
    engine, examples: Sequence[TaskExample], micro_batch_size: int, pad: int | None, stop: Callable[[], bool]
) -> float:
    """NLL per learned token over all examples."""
    total = torch.zeros((), device=engine.device)
    for shares in slices(examples, micro_batch_size, distributed.world_size()):
        if stop():
            raise _StoppedError
        own = shares[distributed.rank()]
        # Ranks without a row in the last micro-batch still take part: under ZeRO-3 a forward is a collective.
        nll = engine(task=to_device(collate_task(own or shares[0][:1], pad), engine.device))
        total += nll if own else 0
    return distributed.all_sum(total).item() / sum(example.learned for example in examples)


def embed_pairs(
    engine, pairs: Sequence[Pair], micro_batch_size: int, pad: int | None, stop: Callable[[], bool]
) -> tuple[torch.Tensor, list[Pair]]:
    """Embeddings of all pairs on every rank, [2, pairs, hidden] on the CPU, and the pairs in the same order.

    The order is that of the keys' hashes: the same for any number of ranks, and as good as random.
    """
    ranks, found = distributed.world_size(), []
    micro_batches = slices(pairs, micro_batch_size, ranks)
    for shares in micro_batches:
        if stop():
            raise _StoppedError
        own = shares[distributed.rank()]
        present = [share or shares[0][:1] for share in shares]
        sizes = [2 * len(present[distributed.rank()])]
        if len({len(share) for share in present}) == 1:  # of shares that differ in size, each is one pass
            sizes = pass_sizes(present, pad, engine.zero_optimization_stage() == 3)
        passes = collate_bitext(present[distributed.rank()], pad, sizes)
        embeddings = engine(bitext=[to_device(inputs, engine.device) for inputs in passes])
        found.append(embeddings[:, : len(own)].cpu())
    whole = torch.cat(distributed.gather_objects(torch.cat(found, dim=1)), dim=1)
    in_rank_order = [pair for rank in range(ranks) for shares in micro_batches for pair in shares[rank]]
    order = sorted(range(len(pairs)), key=lambda index: in_rank_order[index].keys)
    return whole[:, order], [in_rank_order[index] for index in order]


def _alignment_loss(embeddings: torch.Tensor, pairs: list[Pair], config: Config) -> float:
    """Mean InfoNCE over batches of the training batch size (the last one may be smaller), local to this rank."""
    settings = config.alignment.model_copy(update={"negatives": "local"})
    keys, total = pair_keys(pairs), 0.0
    for start in range(0, len(pairs), settings.batch_size):
        part = slice(start, start + settings.batch_size)
        total += alignment_loss(embeddings[:, part], keys[part], settings).item() * len(keys[part])
    return total / len(pairs)


def _retrieval_accuracy(embeddings: torch.Tensor, pairs: list[Pair]) -> float:
    """Mean over language pairs and both directions of top-1 accuracy among the language pair's dev sentences.

    Repeated sentences do not compete, as they do not in the loss.
    """
    scores = []
    for language in sorted({pair.language for pair in pairs}):
        index = [i for i, pair in enumerate(pairs) if pair.language == language]
        texts = torch.tensor([pairs[i].keys[:2] for i in index]).T  # hashes of src and tgt
        found = retrieval.retrieval(embeddings[:, index], texts)["cosine"]
        scores += [found[0, 1].item(), found[1, 0].item()]
    return sum(scores) / len(scores)


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on a device; on a GPU without waiting for it."""
    if device.type == "cuda":  # a copy out of pageable memory may wait for all that the GPU has still to do
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
