"""`mlalign inspect CONFIG`: the first batches as the model sees them, decoded, before anything is trained.

Task rows: dim = masked, green = learned, `_` = padding. Bitext: underlined = pooled, `_` = padding.
"""

from rich.text import Text

from mlalign.config import Config
from mlalign.data import Pair, TaskExample, pad_id
from mlalign.dataset import load_dataset
from mlalign.loss import IGNORED
from mlalign.model import load_tokenizer
from mlalign.tracker import console, say

_ROWS = 4  #: rows shown of each objective's first batch


def inspect(config: Config) -> None:
    """Print counts, and the first rows of each objective's first batch."""
    tokenizer = load_tokenizer(config.model)
    dataset = load_dataset(config, tokenizer)
    pooling = config.alignment.pooling if config.alignment else "mean"
    for objective, order in dataset.orders.items():
        section = getattr(config, objective)
        batch = order.take(section.batch_size)[:_ROWS]
        console.rule(f"{objective}: the first {len(batch)} rows of a batch of {section.batch_size}")
        width = max(len(row.ids) if isinstance(row, TaskExample) else max(len(row.src), len(row.tgt)) for row in batch)
        for row in batch:
            console.print(
                _pair(row, width, tokenizer, pooling) if isinstance(row, Pair) else _task(row, width, tokenizer)
            )
    for name, counts in dataset.counts.items():
        say(f"{name}: {counts}")
    say(f"legend: dim masked, [green learned], underlined pooled ({pooling}), _ padding (id {pad_id(tokenizer)})")


def _task(row: TaskExample, width: int, tokenizer) -> Text:
    line = Text(f"{row.language}  ")
    for token, label in zip(row.ids, row.labels):
        line.append(_shown(tokenizer, token), style="dim" if label == IGNORED else "bold green")
    return line.append("_" * (width - len(row)), style="red")


def _pair(row: Pair, width: int, tokenizer, pooling: str) -> Text:
    line = Text()
    for language, ids in zip(row.language.split("-"), (row.src, row.tgt)):
        line.append(f"{language}  ")
        for position, token in enumerate(ids):
            pooled = pooling == "mean" or position == len(ids) - 1
            line.append(_shown(tokenizer, token), style="underline" if pooled else "dim")
        line.append("_" * (width - len(ids)) + "\n", style="red")
    return line


def _shown(tokenizer, token: int) -> str:
    """A token as text, with line breaks visible and a mark where bytes make no character."""
    return tokenizer.decode([token]).replace("\n", "⏎").replace("\ufffd", "·")
