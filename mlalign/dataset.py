"""What a run learns from: the configured sources as global orders for training and lists for dev."""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from mlalign.config import Alignment, Config, Task
from mlalign.data import UNKNOWN, Counts, Pair, TaskExample, load_bitext, load_task
from mlalign.errors import UserError
from mlalign.sampler import GlobalOrder, in_memory, streamed


@dataclass
class Dataset:
    """Both objectives' data; what is not configured is empty."""

    orders: dict[str, GlobalOrder] = field(default_factory=dict)  #: "task" and "alignment": training examples
    counts: dict[str, Counts] = field(default_factory=dict)  #: by config key; a stream's grow while it is read
    task_dev: list[TaskExample] = field(default_factory=list)
    bitext_dev: list[Pair] = field(default_factory=list)
    epoch_rows: int = 0  #: training rows of the task, of the bitext where there is no task; 0 = unknown (a stream)

    @property
    def has_dev(self) -> bool:
        return bool(self.task_dev or self.bitext_dev)

    def languages(self) -> dict[str, list[str]]:
        """`supervised`: languages of the task's training rows; `aligned`: of the bitext, both sides."""
        task, bitext = (self.counts.get(f"{name}.train", Counts()) for name in ("task", "alignment"))
        return {"supervised": sorted(task.languages.keys() - {UNKNOWN}), "aligned": sorted(bitext.sides)}


def load_dataset(config: Config, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Read, check and tokenise all sources; streams are opened and not yet read.

    Raises UserError, naming file and line, for whatever is wrong with them.
    """
    dataset = Dataset()
    if config.alignment:
        rows = _add_order(dataset, "alignment", config.alignment, load_bitext, tokenizer, config.seed)
        dataset.epoch_rows = rows
        dataset.bitext_dev = _load_dev(dataset, "alignment", config.alignment, load_bitext, tokenizer)
    if config.task:
        rows = _add_order(dataset, "task", config.task, load_task, tokenizer, config.seed)
        dataset.epoch_rows = rows
        dataset.task_dev = _load_dev(dataset, "task", config.task, load_task, tokenizer)
    return dataset


def _add_order(dataset: Dataset, name: str, section: Task | Alignment, load, tokenizer, seed: int) -> int:
    """Make the global order of one objective; returns its number of rows, 0 for a stream."""
    counts = dataset.counts[f"{name}.train"] = Counts()
    if section.streaming:
        epoch = streamed(lambda: load(section.train, tokenizer, section.max_length, counts), section.batch_size, seed)
        dataset.orders[name] = GlobalOrder(epoch)
        return 0
    rows = _load_all(f"{name}.train", section, section.train, load, tokenizer, counts)
    dataset.orders[name] = GlobalOrder(in_memory(rows, section.batch_size, section.language_temperature, seed))
    return len(rows)


def _load_dev(dataset: Dataset, name: str, section: Task | Alignment, load, tokenizer) -> list:
    if not section.dev:
        return []
    counts = dataset.counts[f"{name}.dev"] = Counts()
    return _load_all(f"{name}.dev", section, section.dev, load, tokenizer, counts)


def _load_all(key: str, section: Task | Alignment, sources: list, load, tokenizer, counts: Counts) -> list:
    rows = list(load(sources, tokenizer, section.max_length, counts))
    if not rows:
        raise UserError(f"{key}: every row was dropped: {counts}")
    return rows
