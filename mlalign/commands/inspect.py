"""`mlalign inspect CONFIG`: the first batches as the model sees them, decoded, before anything is trained.

Task rows: dim = masked, green = learned, `_` = padding. Bitext: underlined = pooled, `_` = padding.
"""

from itertools import groupby
from operator import itemgetter

from rich.text import Text

from mlalign.config import Config
from mlalign.dataset import load_dataset
from mlalign.examples import Pair, TaskExample
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
    say("legend: dim masked, green learned, underlined pooled, _ padding")


def _task(row: TaskExample, width: int, tokenizer) -> Text:
    styles = ["dim" if label == IGNORED else "bold green" for label in row.labels]
    line = Text(f"{row.language}  ").append(_shown(row.ids, styles, tokenizer))
    return line.append("_" * (width - len(row)), style="red")


def _pair(row: Pair, width: int, tokenizer, pooling: str) -> Text:
    line = Text()
    for language, ids in zip(row.languages, (row.src, row.tgt)):
        pooled = [pooling == "mean" or position == len(ids) - 1 for position in range(len(ids))]
        line.append(f"{language}  ").append(_shown(ids, ["underline" if p else "dim" for p in pooled], tokenizer))
        line.append("_" * (width - len(ids)) + "\n", style="red")
    return line


def _shown(ids: list[int], styles: list[str], tokenizer) -> Text:
    """Tokens as text, each run of one style decoded together, as a character may span tokens."""
    text = Text()
    for style, run in groupby(zip(ids, styles), key=itemgetter(1)):
        text.append(tokenizer.decode([token for token, _ in run]).replace("\n", "⏎"), style=style)
    return text
