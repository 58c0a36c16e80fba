"""From examples to the tensors of a pass: padded to one width, or packed one after the other."""

from itertools import accumulate, combinations, pairwise

import torch
from transformers import PreTrainedTokenizerBase

from mlalign.examples import Pair, TaskExample
from mlalign.loss import IGNORED


def pad_id(tokenizer: PreTrainedTokenizerBase, vocabulary: float) -> int:
    """An id below `vocabulary` for positions that the attention mask hides and no label covers."""
    pad = tokenizer.pad_token_id
    return pad if pad is not None and pad < vocabulary else 0


def _padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def collate_ids(rows: list[list[int]], pad: int | None) -> dict[str, torch.Tensor]:
    """Rows for one pass, right-padded, or packed one after the other if `pad` is None.

    Padded: `input_ids` and `attention_mask`, each [rows, width]. Packed: `input_ids` and `position_ids`, each [1,
    tokens], every row's positions from 0 on; `attention_mask` of the padded rows; and `slots` [tokens], where in the
    flattened padded rows each token would be.
    """
    mask = _padded([[1] * len(row) for row in rows], 0)
    if pad is not None:
        return {"input_ids": _padded(rows, pad), "attention_mask": mask}
    row, position = mask.nonzero(as_tuple=True)
    ids = torch.tensor([[token for row in rows for token in row]])
    slots = row * mask.shape[1] + position
    return {"input_ids": ids, "position_ids": position[None], "attention_mask": mask, "slots": slots}


def collate_task(batch: list[TaskExample], pad: int | None) -> dict[str, torch.Tensor]:
    """`collate_ids`, and for each learned token, [learned]: `targets`, its id, and `positions`, where in the flattened
    `input_ids` the state is that predicts it. Neither depends on the padding id."""
    inputs = collate_ids([example.ids for example in batch], pad)
    labels = _padded([example.labels for example in batch], IGNORED)
    labels[:, 0] = IGNORED  # nothing predicts the first token
    if pad is None:
        labels = labels.flatten()[inputs["slots"]]
    learned = (labels.flatten() != IGNORED).nonzero().squeeze(1)
    return inputs | {"positions": learned - 1, "targets": labels.flatten()[learned]}


def collate_bitext(batch: list[Pair], pad: int | None, sizes: list[int]) -> list[dict[str, torch.Tensor]]:
    """The passes that encode both sides of all pairs, each a `collate_ids`, longest rows first.

    `rows` of each says which rows it holds: pair i's src is row i, its tgt row pairs + i. `sizes`: rows of each, see
    `pass_sizes`.
    """
    sides = [pair.src for pair in batch] + [pair.tgt for pair in batch]
    order = sorted(range(len(sides)), key=lambda row: -len(sides[row]))
    passes, edges = [], [0, *accumulate(sizes)]
    for rows in (order[start:end] for start, end in pairwise(edges)):
        passes.append(collate_ids([sides[row] for row in rows], pad) | {"rows": torch.tensor(rows)})
    return passes


def pair_keys(batch: list[Pair]) -> torch.Tensor:
    """[pairs, 3], int64: see `Pair.keys`."""
    return torch.tensor([pair.keys for pair in batch], dtype=torch.int64)


def pass_sizes(shares: list[list[Pair]], pad: int | None, zero3: bool) -> list[int]:
    """Rows of each pass that encodes a micro-batch, longest rows first: one pass, unless more of them pad less.

    One more pass is worth it if it saves a twentieth of the positions, because it launches as many kernels again; under
    ZeRO-3 it never is, because it gathers the parameters again. `shares` are the micro-batches of all ranks, all of the
    same size, so every rank decides alike.
    """
    count = 2 * len(shares[0])
    if pad is None or zero3:
        return [count]
    lengths = [sorted((len(side) for p in share for side in (p.src, p.tgt)), reverse=True) for share in shares]
    widths = [sum(each) for each in zip(*lengths)]  # of a pass that begins with this row, over all ranks

    def cost(edges: list[int]) -> float:
        positions = sum((end - start) * widths[start] for start, end in pairwise(edges))
        return positions * (1 + (len(edges) - 2) / 20)

    eighths = sorted({count * eighth // 8 for eighth in range(1, 8)} - {0})
    ways = ([0, *cuts, count] for number in range(4) for cuts in combinations(eighths, number))
    return [end - start for start, end in pairwise(min(ways, key=cost))]
