"""Checks that end a run: non-finite gradients, ranks whose weights diverge, memory that is used up."""

import json
import math
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from mlalign.config import Config
from mlalign.distributed import device, gather_objects, gather_rows, is_main, on_main, rank, world_size
from mlalign.durable import write_whole
from mlalign.errors import UserError
from mlalign.examples import Pair, TaskExample
from mlalign.tracker import say


def tell_of_skipped(
    step: int, losses: dict[str, list[float]], dealt: list[tuple[str, list]], tokenizer, run_dir: Path
) -> None:
    """Say that a step was skipped, and whose loss was at fault; write its rows to skipped/. Called by all ranks.

    Args: losses: objective -> this rank's shares of its batches' losses; dealt: of each batch its objective, and
    micro-batches -> ranks -> rows.
    """
    bad = [name for name, shares in losses.items() if not all(map(math.isfinite, shares))]
    by_rank = gather_objects(bad)
    guilty = [(name, [rank for rank, names in enumerate(by_rank) if name in names]) for name in losses]
    named = [f"the {name} loss of rank {_listed(ranks)}" for name, ranks in guilty if ranks]
    reason = f"{' and '.join(named)} is not finite" if named else "the gradient is not finite, though all losses are"
    path = run_dir / "skipped" / f"step-{step:06d}.jsonl"
    with on_main():
        if is_main():
            path.parent.mkdir(exist_ok=True)
            write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(dealt, tokenizer)))
    say(f"WARNING: step {step} is skipped: {reason}; its rows are in {path}", "bold red")


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


def _rows(dealt: list[tuple[str, list]], tokenizer) -> Iterator[dict[str, str | int]]:
    for objective, micro_batches in dealt:
        for number, shares in enumerate(micro_batches):
            for owner, rows in enumerate(shares):
                for row in rows:
                    place = {"objective": objective, "micro_batch": number, "rank": owner}
                    yield place | _as_text(row, tokenizer)


def _as_text(row: TaskExample | Pair, tokenizer) -> dict[str, str]:
    if isinstance(row, TaskExample):
        return {"lang": row.language, "text": tokenizer.decode(row.ids)}
    names = zip(("src_lang", "tgt_lang"), row.languages)
    return {"src": tokenizer.decode(row.src), "tgt": tokenizer.decode(row.tgt), **dict(names)}


def refuse_many_skipped(in_a_row: int, most: int, step: int, run_dir: Path) -> None:
    """Raise UserError where more steps in a row were skipped than are allowed; the arguments are all ranks' alike."""
    if in_a_row > most:
        raise UserError(
            f"the last {in_a_row} steps up to {step} gave a non-finite loss or gradient: try a lower "
            f"optimizer.lr or a longer warmup, and look at {run_dir / 'skipped'}; {run_dir / 'checkpoints'} holds what "
            "was saved before"
        )


def refuse_unlike(values: dict[str, object]) -> None:
    """Raise UserError where something that all ranks must have alike is not rank 0's on some rank. Called by all."""
    every = gather_objects((socket.gethostname(), values))
    (first_host, first), *others = every
    for number, (host, own) in enumerate(others, 1):
        for name in first:
            if own[name] != first[name]:
                raise UserError(
                    f"{name}: {own[name]} on rank {number} (host {host}), but {first[name]} on rank 0 (host "
                    f"{first_host}): are the files the same on all hosts?"
                )


def refuse_other_rows(digest: int, step: int) -> None:
    """Raise UserError where a rank's batches held other rows than rank 0's up to here: `digest` stands for them."""
    every = gather_rows(torch.tensor([digest], device=device()))
    differing = (every != every[0]).nonzero()
    if len(differing):
        raise UserError(
            f"rank {differing[0].item()} has read other rows than rank 0 by step {step}: a source is not the same on "
            "all hosts, or a stream ended early on one"
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


@contextmanager
def memory_said(config: Config, place: Callable[[], tuple[str, int]]) -> Iterator[None]:
    """Where memory is used up in the body, raise UserError with what to change. `place` tells phase and step."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_of_memory(error):
            raise
        phase, step = place()
        raise UserError(
            f"rank {rank()} ran out of memory ({phase}, step {step}): {_smaller(config, phase)}; then the same command "
            "goes on, and `mlalign plan` says beforehand what fits"
        ) from error


def is_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is used up, of a GPU or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "out of memory" in str(error).lower() or "can't allocate memory" in str(error)


def _smaller(config: Config, phase: str) -> str:
    """What to change in a config, the cheapest first."""
    section = {"task batch": config.task, "alignment batch": config.alignment}.get(phase)
    changes = []
    contrasted = phase == "alignment batch" and config.alignment.negatives == "local"  # what a loss is taken over
    if section is not None and section.micro_batch_size > 1 and not contrasted:
        changes.append(f"set {phase.split()[0]}.micro_batch_size={section.micro_batch_size // 2}")
    if not config.model.gradient_checkpointing:
        changes.append("set model.gradient_checkpointing=true")
    changes.append("shard more (deepspeed=ds_configs/zero3.json, zero3_offload.json), or take more ranks")
    return ", or ".join(changes)
