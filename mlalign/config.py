"""The whole configuration: one typed schema, read from YAML, overridden on the command line as `a.b=c`.

`load("recipe.yaml", ["optimizer.lr=1e-4"])` returns a validated `Config` or raises a `UserError` that names the key.
What the file named by `deepspeed:` may hold, `zero` says.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from yaml import YAMLError

from mlalign.errors import UserError
from mlalign.hostile import redacted, refuse_bomb, refuse_secrets


class Source(BaseModel, extra="forbid"):
    """Where rows come from."""

    path: str  #: a file or glob of .jsonl, .json, .parquet or .csv files, or a dataset's id on the hub
    subset: str | None = None  #: the hub dataset's configuration name
    split: str = "train"  #: the hub dataset's split
    columns: dict[str, str] = {}  #: our field -> the column that holds it, such as {prompt: prefix, completion: text}
    language: str | None = None  #: language of task rows that have no `lang` field


def _as_sources(value: Any) -> Any:
    """`train: a.jsonl` and `train: [a.jsonl, {path: b}]` both mean a list of sources; `dev:` or null, an empty one."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[list[Source], BeforeValidator(_as_sources)]


class Model(BaseModel, extra="forbid"):
    path: str  #: a directory or a hub id of any decoder-only model
    attention: str = "auto"
    """A transformers name; auto = flash attention (on CUDA, in bf16) of flash-attn or torch, else sdpa if there is."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"  #: auto = bf16 on CUDA, else fp32
    packing: bool | Literal["auto"] = "auto"  #: rows without padding behind each other; auto = with flash attention
    gradient_checkpointing: bool = False  #: compute activations again in the backward pass, instead of keeping them
    compile: bool = False  #: torch.compile of each block, with ZeRO-0 to 2; takes half a minute at a start
    trust_remote_code: bool = False  #: run Python code that comes with the model


#: What fp32 can work with, and no infinity.
Number = Annotated[float, Field(le=1e30)]
#: Rows or tokens, so many that a batch can still be made of them.
Size = Annotated[int, Field(gt=0, le=10**6)]


class Lora(BaseModel, extra="forbid"):
    r: int = Field(8, gt=0, le=2**16)  #: rank
    alpha: Number = Field(16, gt=0)  #: the adapter counts alpha / r times
    dropout: float = Field(0.1, ge=0, lt=1)  #: of the adapter's input
    target_modules: str | list[str] = "all-linear"  #: peft's names


class Task(BaseModel, extra="forbid"):
    train: Sources = Field(min_length=1)
    dev: Sources = []
    streaming: bool = False  #: read rows as they are needed instead of holding them in memory
    batch_size: Size = 128  #: rows of one task batch, over all ranks
    micro_batch_size: Size = 8  #: rows of one forward pass on one rank
    max_length: Size = Field(512, gt=1)  #: tokens; longer rows are cut at the end, and counted
    language_temperature: float = Field(1.0, ge=0, le=1)  #: 1 = languages by their size, 0 = uniform


def _as_layer(value: Any) -> Any:
    """`probe:DIR` is the layer that `mlalign probe` recommends in DIR/probe.json."""
    if not isinstance(value, str) or not value.startswith("probe:"):
        return value
    path = Path(value.removeprefix("probe:")) / "probe.json"
    try:
        layer = json.loads(path.read_text())["recommendation"]["layer"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as the result of `mlalign probe`") from error
    return layer


class Alignment(BaseModel, extra="forbid"):
    train: Sources = Field(min_length=1)
    dev: Sources = []
    streaming: bool = False  #: as of the task
    batch_size: Size = 128  #: pairs of one alignment batch, over all ranks
    micro_batch_size: Size = 32  #: pairs of one forward pass on one rank
    max_length: Size = Field(128, gt=1)  #: tokens of one side
    language_temperature: float = Field(1.0, ge=0, le=1)  #: as of the task, of language pairs
    layer: Annotated[int | Literal["auto"], BeforeValidator(_as_layer)] = "auto"
    """Number of decoder blocks run; auto = half the depth, probe:DIR = what `mlalign probe` recommends."""
    pooling: Literal["mean", "last"] = "mean"  #: a sentence's embedding: the mean of its states, or the last one
    infonce: Literal["symmetric", "one_way"] = "symmetric"  #: one_way: src finds tgt only
    temperature: Number = Field(0.1, gt=0)  #: of InfoNCE: cosines are divided by it
    negatives: Literal["global", "local"] = "global"  #: the whole batch, or one rank's micro-batch
    positives: Literal["id", "pair"] = "id"  #: id: rows that share a sentence or an id are positives of each other
    weight: Number = Field(1.0, gt=0)  #: factor of the alignment loss


def _as_ratio(value: Any) -> Any:
    """YAML 1.1 reads an unquoted 2:1 as the base-60 number 121."""
    return "{}:{}".format(*divmod(value, 60)) if isinstance(value, int) and 60 <= value < 3600 else value


class Interleave(BaseModel, extra="forbid"):
    mode: Literal["joint", "alternate", "micro_batch"] = "joint"
    """joint: both objectives in a step; alternate: steps in turn; micro_batch: the authors' way; see `schedule`."""
    ratio: Annotated[str, BeforeValidator(_as_ratio)] = Field("1:1", pattern=r"^\d+:\d+$")  #: task : alignment batches
    micro_batches: int | None = Field(None, gt=0, le=10**4)  #: mode micro_batch: batches accumulated in one step

    @property
    def parts(self) -> tuple[int, int]:
        """Task batches and alignment batches of one cycle."""
        task, align = self.ratio.split(":")
        return int(task), int(align)


Share = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(BaseModel, extra="forbid"):
    lr: Number = Field(5e-4, gt=0)  #: the highest, after warmup
    betas: tuple[Share, Share] = (0.9, 0.999)  #: of AdamW, as is eps
    eps: Number = Field(1e-8, gt=0)
    weight_decay: Number = Field(0.0, ge=0)  #: of matrices; vectors (norms, biases) are never decayed
    clip: Number = Field(1.0, ge=0)  #: largest global gradient norm; 0 = no clipping
    max_skipped_steps: int = Field(10, ge=0)  #: in a row, for a non-finite loss or gradient, before the run ends
    schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = "inverse_sqrt"  #: how lr falls after warmup
    warmup_ratio: float = Field(0.03, ge=0, le=1)  #: share of all steps
    steps: int | None = Field(None, gt=0, le=10**9)  #: or epochs: one of the two
    epochs: float | None = Field(None, gt=0, le=10**4)
    """Passes over the task rows (over the pairs if there is no task)."""


class Evaluation(BaseModel, extra="forbid"):
    every: int = Field(200, gt=0)  #: steps between evaluations on dev
    patience: int = Field(5, ge=0)  #: evaluations without a better dev loss before the run stops; 0 = never stop early


class Config(BaseModel, extra="forbid"):
    run_dir: str  #: what a run writes, and what the same command goes on from
    seed: int = Field(1, ge=0, lt=2**32)  #: of order, dropout and new adapters
    model: Model
    lora: Lora | None = None  #: null = full fine-tuning
    task: Task | None = None
    alignment: Alignment | None = None
    interleave: Interleave = Interleave()
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation = Evaluation()
    deepspeed: str | None = None  #: a JSON file with ZeRO and communication keys; null = ZeRO-0
    checkpoint_every: int = Field(200, gt=0)  #: steps
    async_checkpoint: bool | Literal["auto"] = "auto"
    """Write checkpoints while training goes on, from a copy in host memory; auto = if the optimizer is on a GPU."""
    log_every: int = Field(10, gt=0)  #: steps
    log_gradients: bool = False  #: also cosine and norm ratio of the two objectives' gradients, where there are two
    stuck_after: float = Field(600, ge=0, allow_inf_nan=False)
    """Seconds without progress on any rank after which the job ends, to be started again; 0 = wait for ever."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> "Config":
        task, align = self.interleave.parts
        if task == align == 0:
            raise ValueError("interleave.ratio is 0:0: give at least one objective a share")
        for name, share in (("task", task), ("alignment", align)):
            section = getattr(self, name)
            if share and section is None:
                raise ValueError(f"interleave.ratio {self.interleave.ratio} needs the section `{name}`: it is missing")
            if not share and section is not None:
                raise ValueError(f"interleave.ratio {self.interleave.ratio} leaves `{name}` out, but it is set")
            if section is not None and section.streaming and section.language_temperature != 1:
                raise ValueError(f"{name}.language_temperature must be 1 with {name}.streaming: a stream has no counts")
        if (self.interleave.mode == "micro_batch") != (self.interleave.micro_batches is not None):
            raise ValueError("interleave.micro_batches is required in mode micro_batch and has no meaning in others")
        if (self.optimizer.steps is None) == (self.optimizer.epochs is None):
            raise ValueError("give either optimizer.steps or optimizer.epochs, and not both")
        main = self.task or self.alignment
        batches = {"joint": task + align, "alternate": 1, "micro_batch": self.interleave.micro_batches}
        size = batches[self.interleave.mode]
        if self.log_gradients and size and task and align and task % size == align % size == 0:
            raise ValueError("log_gradients compares two objectives of one step: with this interleave no step has both")
        if self.optimizer.epochs is not None and main.streaming:
            raise ValueError("optimizer.epochs needs the number of rows, which a stream hides: give optimizer.steps")
        if self.alignment and any(s.language for s in (*self.alignment.train, *self.alignment.dev)):
            raise ValueError("language belongs to task sources: bitext rows carry src_lang and tgt_lang")
        if self.alignment and self.alignment.batch_size == 1:
            raise ValueError("alignment.batch_size is 1: a single pair has no negatives, use at least 2")
        local = self.alignment and self.alignment.negatives == "local"
        if local and self.alignment.micro_batch_size == 1:
            raise ValueError("alignment.micro_batch_size is 1 with local negatives: a single pair has no negatives")
        return self

    def check_ranks(self, ranks: int) -> None:
        """Raises UserError where so many ranks cannot share the batches evenly."""
        for name, section in (("task", self.task), ("alignment", self.alignment)):
            if section is not None and section.batch_size % ranks:
                raise UserError(f"{name}.batch_size is {section.batch_size}, which {ranks} ranks cannot share evenly")
        if self.alignment and self.alignment.negatives == "local":
            share, size = self.alignment.batch_size // ranks, self.alignment.micro_batch_size
            if 1 in (share, size, share % size):
                raise UserError(
                    f"alignment.batch_size {self.alignment.batch_size} is {share} pairs per rank, {size} at a time: "
                    "that leaves a micro-batch of one pair, which has no local negatives"
                )

    def without_paths(self) -> dict[str, Any]:
        """Dotted keys and values that all hosts must have alike: paths may differ between them."""
        values = flatten(self.model_dump(mode="json", exclude={"run_dir", "deepspeed"}))
        return {key: _without_paths(value) for key, value in values.items() if key != "model.path"}

    def differences(self, other: "Config") -> list[str]:
        """Dotted keys whose values differ, apart from those that do not change the result."""
        mine, theirs = flatten(self.model_dump(mode="json")), flatten(other.model_dump(mode="json"))
        ignored = {
            "run_dir",
            "log_every",
            "log_gradients",
            "checkpoint_every",
            "async_checkpoint",
            "stuck_after",
            "deepspeed",
        }
        ignored |= {"model.gradient_checkpointing", "task.micro_batch_size"}
        if not self.alignment or self.alignment.negatives == "global":
            ignored.add("alignment.micro_batch_size")
        return sorted(k for k in mine.keys() | theirs.keys() if k not in ignored and mine.get(k) != theirs.get(k))


def load(path: str | Path, overrides: list[str] = []) -> Config:  # noqa: B006 (never changed)
    """Read a YAML file, apply `a.b=c` overrides, validate.

    Raises UserError, naming the key, for a missing or broken file, an unknown key, a wrong type or a contradiction.
    """
    try:
        return _load(Path(path), overrides)
    except UserError as error:
        raise UserError(redacted(str(error))) from error


def _load(path: Path, overrides: list[str]) -> Config:
    if not path.is_file() and path.parts[:2] == ("mlalign", "recipes"):
        path = Path(__file__).parent / "recipes" / path.name  # a shipped one, named from outside of the checkout
    if not path.is_file():
        raise UserError(f"config {path} does not exist or is not a file")
    try:
        refuse_bomb(path)
        raw = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        raise UserError(f"config {path} is not valid YAML: {_one_line(error)}") from error
    if not OmegaConf.is_dict(raw):
        raise UserError(f"config {path} must hold `key: value` lines")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r} must have the form key.subkey=value")
        try:
            OmegaConf.update(raw, key, OmegaConf.from_dotlist([f"value={value}"]).value)
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            raise UserError(f"override {override!r} cannot be applied: {_one_line(error)}") from error
    try:
        values = OmegaConf.to_container(raw, resolve=True, throw_on_missing=True)
        refuse_secrets(flatten(values), f"config {path}")
        return Config.model_validate(values)
    except OmegaConfBaseException as error:
        raise UserError(f"config {path}: {_one_line(error)}") from error
    except ValidationError as error:
        raise UserError(f"config {path}: {_explain(error)}") from error


def dump(config: Config) -> str:
    """Every key, defaults included, as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


_ALTERNATIVE = re.compile(r"bool|int|str|literal\[.*\]|list\[.*\]")


def _explain(error: ValidationError) -> str:
    """All of pydantic's complaints as one sentence, each with the key's path; alternatives of a key are one."""
    by_key: dict[str, list[dict]] = {}
    for item in error.errors():
        by_key.setdefault(_key(item), []).append(item)
    return "; ".join(", or ".join([_explain_one(first), *map(_message, rest)]) for first, *rest in by_key.values())


def _key(item: dict) -> str:
    """Dotted, without the types that pydantic adds where a key may be of several."""
    return ".".join(part for part in map(str, item["loc"]) if not _ALTERNATIVE.fullmatch(part))


def _message(item: dict) -> str:
    message = item["msg"].removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}"


def _explain_one(item: dict) -> str:
    key = _key(item)
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}{suggest(key.split('.')[-1], _siblings(item['loc']))}"
    if item["type"] == "missing":
        return f"{key} is missing"
    if not key:
        return item["msg"].removeprefix("Value error, ")
    return f"{key} is {item['input']!r}: {_message(item)}"


def _siblings(loc: tuple) -> set[str]:
    """Field names of the section in which the key at `loc` was looked for."""
    model: type[BaseModel] = Config
    for part in loc[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            nested = _nested_model(model.model_fields[part].annotation)
            model = nested or model
    return set(model.model_fields)


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    """The section class inside `Task`, `Task | None` or `list[Source]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_nested_model(argument) for argument in getattr(annotation, "__args__", ()))
    return next((model for model in inner if model), None)


def suggest(key: str, known: set[str]) -> str:
    """` (did you mean X?)` where a known key is like this one, else nothing."""
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted keys."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        k: v for key, value in values.items() for k, v in flatten(value, f"{prefix}.{key}" if prefix else key).items()
    }


def _without_paths(value: Any) -> Any:
    """Sources, which are lists, without where they lie."""
    if not isinstance(value, list):
        return value
    return [{k: v for k, v in item.items() if k != "path"} if isinstance(item, dict) else item for item in value]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
