"""`mlalign inspect CONFIG`: the first batches as the model sees them, decoded, before anything is trained.

Task rows: dim = masked, green = learned, `_` = padding. Bitext: underlined = pooled, `_` = padding.
"""

from rich.text import Text

from mlalign.config import Config
from mlalign.data import Pair, TaskExample, pad_id
from mlalign.dataset import load_dataset
from mlalign.loss import IGNORED
from mlalign.model import load_tokenizer
from mlalign.sampler import slices
from mlalign.tracker import console, say

_ROWS = 8  #: rows shown of each objective's first micro-batch


def inspect(config: Config) -> None:
    """Print the first rows of each objective's first micro-batch on one rank, and what was read."""
    tokenizer = load_tokenizer(config.model)
    dataset = load_dataset(config, tokenizer)
    for objective, order in dataset.orders.items():
        section = getattr(config, objective)
        share = slices(order.take(section.batch_size), section.micro_batch_size, ranks=1)[0][0]
        console.rule(f"{objective}: {min(len(share), _ROWS)} rows of the first micro-batch of {len(share)}")
        if objective == "task":
            width = max(map(len, share))
            lines = [_task(row, width, tokenizer) for row in share[:_ROWS]]
        else:
            width = max(max(len(pair.src), len(pair.tgt)) for pair in share)
            lines = [_pair(pair, width, tokenizer, config.alignment.pooling) for pair in share[:_ROWS]]
        for line in lines:
            console.print(line)
    for name, counts in dataset.counts.items():
        say(f"{name}: {counts}")
    say(f"legend: dim masked, green learned, underlined pooled, _ padding (id {pad_id(tokenizer)})")


def _task(row: TaskExample, width: int, tokenizer) -> Text:
    line = Text(f"{row.language}  ")
    for token, label in zip(row.ids, row.labels):
        line.append(_shown(tokenizer, token), style="dim" if label == IGNORED else "bold green")
    return line.append("_" * (width - len(row)), style="red")


def _pair(row: Pair, width: int, tokenizer, pooling: str) -> Text:
    line = Text()
    for language, ids in zip(row.languages, (row.src, row.tgt)):
        line.append(f"{language}  ")
        for position, token in enumerate(ids):
            pooled = pooling == "mean" or position == len(ids) - 1
            line.append(_shown(tokenizer, token), style="underline" if pooled else "dim")
        line.append("_" * (width - len(ids)) + "\n", style="red")
    return line


def _shown(tokenizer, token: int) -> str:
    """A token as text, with line breaks visible and a mark where bytes make no character."""
    return tokenizer.decode([token]).replace("\n", "⏎").replace("\ufffd", "·")
