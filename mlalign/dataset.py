"""What a run learns from: the configured sources as global orders for training and lists for dev."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from mlalign.config import Alignment, Config, Task
from mlalign.data import UNKNOWN, load_bitext, load_task
from mlalign.errors import UserError
from mlalign.examples import Counts, Pair, PairRows, TaskExample, TaskRows
from mlalign.rows import is_local, matching
from mlalign.sampler import GlobalOrder, in_memory, streamed
from mlalign.token_cache import tokenised, tokenizer_key

_LOADERS = {"task": load_task, "alignment": load_bitext}
_PACKED = {"task": TaskRows, "alignment": PairRows}


@dataclass
class Dataset:
    """Both objectives' data; what is not configured is empty."""

    orders: dict[str, GlobalOrder] = field(default_factory=dict)  #: "task" and "alignment": training examples
    counts: dict[str, Counts] = field(default_factory=dict)  #: by config key; a stream's grow while it is read
    task_dev: Sequence[TaskExample] = ()
    bitext_dev: Sequence[Pair] = ()
    tick: Callable[[], None] = lambda: None  #: called while a stream is read
    rows: dict[str, int] = field(default_factory=dict)  #: "task" and "alignment": training rows, but of a stream
    digests: dict[str, str] = field(default_factory=dict)  #: of them

    @property
    def epoch_rows(self) -> int:
        """Training rows of the task, of the bitext where there is no task; 0 = unknown (a stream)."""
        return self.rows.get("task" if "task" in self.orders else "alignment", 0)

    @property
    def has_dev(self) -> bool:
        return bool(self.task_dev or self.bitext_dev)

    def languages(self) -> dict[str, list[str]]:
        """`supervised`: languages of the task's training rows; `aligned`: of the bitext, both sides."""
        task, bitext = (self.counts.get(f"{name}.train", Counts()) for name in ("task", "alignment"))
        return {"supervised": sorted(task.languages.keys() - {UNKNOWN}), "aligned": sorted(bitext.sides)}


def load_dataset(config: Config, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Read, check and tokenise all sources, or find them in the cache; streams are opened and not yet read.

    Raises UserError, naming file and line, for whatever is wrong with them.
    """
    _refuse_dev_in_train(config)
    dataset, cached_as = Dataset(), tokenizer_key(tokenizer)
    if config.alignment:
        _add_order(dataset, "alignment", config.alignment, tokenizer, cached_as, config.seed)
        dataset.bitext_dev = _add_rows(dataset, "alignment", "dev", config.alignment, tokenizer, cached_as)
    if config.task:
        _add_order(dataset, "task", config.task, tokenizer, cached_as, config.seed)
        dataset.task_dev = _add_rows(dataset, "task", "dev", config.task, tokenizer, cached_as)
    return dataset


def _refuse_dev_in_train(config: Config) -> None:
    """Raise UserError for a file of dev that training reads too: early stopping would follow what was learned."""
    for name, section in (("task", config.task), ("alignment", config.alignment)):
        if section is None:
            continue
        dev = {file for source in section.dev if is_local(source.path) for file in matching(source.path)}
        for source in section.train:
            shared = sorted(dev & set(matching(source.path))) if is_local(source.path) else []
            if shared:
                raise UserError(
                    f"{name}.train {source.path} holds {shared[0]}, which {name}.dev names: name train alone"
                )


def _add_order(
    dataset: Dataset, name: str, section: Task | Alignment, tokenizer, cached_as: str | None, seed: int
) -> None:
    """Make the global order of one objective."""
    if section.streaming:
        counts = dataset.counts[f"{name}.train"] = Counts()
        load = _LOADERS[name]

        def read() -> Iterator:
            return load(section.train, tokenizer, section.max_length, counts, streaming=True)

        epoch = streamed(read, section.batch_size, seed, lambda: dataset.tick())
        dataset.orders[name] = GlobalOrder(epoch)
        return
    rows = _add_rows(dataset, name, "train", section, tokenizer, cached_as)
    dataset.orders[name] = GlobalOrder(in_memory(rows, section.batch_size, section.language_temperature, seed))
    dataset.rows[name] = len(rows)
    dataset.digests[name] = rows.digest


def _add_rows(
    dataset: Dataset, name: str, part: str, section: Task | Alignment, tokenizer, cached_as: str | None
) -> Sequence:
    sources, key = getattr(section, part), f"{name}.{part}"
    if not sources:
        return ()

    def read(counts: Counts) -> Iterator:
        return _LOADERS[name](sources, tokenizer, section.max_length, counts, section.streaming)

    rows, dataset.counts[key] = tokenised(_PACKED[name], sources, cached_as, section.max_length, read)
    if not rows:
        raise UserError(f"{key}: every row was dropped: {dataset.counts[key]}")
    return rows
