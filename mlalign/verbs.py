"""The verbs of the command line and their options; each imports what it needs when it runs."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

_ASKED_FOR = "cpu" if os.environ.get("DS_ACCELERATOR") == "cpu" else "cuda"  # before `main` sets it for want of a GPU

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, see mlalign/recipes.")]
Precision = Literal["auto", "bf16", "fp32"]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with MODEL.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as optimizer.lr=1e-4.")]


@app.callback()
def _root(local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0) -> None:
    """Fine-tune an LLM on a task and align its middle layer across languages, in one run."""
    # The deepspeed launcher appends --local_rank to what it starts; LOCAL_RANK says the same.


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Fine-tune and align; run the same command again to resume."""
    from mlalign.config import load

    settings = load(config, overrides or [])  # before the slow import below: a typo should not take seconds to name
    with _imports():
        from mlalign.commands.train import train

    train(settings)


@app.command()
def inspect(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the first batches, decoded: what is masked, learned, padding, and pooled."""
    from mlalign.config import load

    settings = load(config, overrides or [])
    with _imports():
        from mlalign.commands.inspect import inspect

    inspect(settings)


@app.command()
def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="A recipe; also checks that everything it needs is there.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check whether training can start here, and say what to do if not; under a launcher, on all ranks together."""
    from mlalign.config import load

    settings = load(config, overrides or []) if config else None
    with _imports():
        from mlalign.commands.doctor import doctor

    doctor(settings)


@app.command()
def evaluate(
    output: Annotated[Path, typer.Option(help="Directory for the report and the predictions.")],
    task: Annotated[str, typer.Option(help="slot_filling, translation, json_extraction or items.")],
    model: Annotated[str | None, typer.Argument(help="A directory or hub id.")] = None,
    test: Annotated[
        list[str] | None, typer.Option(help="Files or globs of task rows with `lang`; may be repeated.")
    ] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="A peft adapter or a RUN_DIR; may be repeated.")] = None,
    backend: Annotated[Literal["hf", "vllm"], typer.Option(help="What generates; vllm must be installed.")] = "hf",
    precision: Annotated[Precision, typer.Option(help="auto = bf16 on CUDA, else fp32.")] = "auto",
    beams: Annotated[int, typer.Option(min=1, help="1 = greedy.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch on one rank.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens; the rest is cut off.")] = 128,
    trust_remote_code: TrustRemoteCode = False,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Rows per language; all by default.")] = None,
    comet: Annotated[
        str | None, typer.Option(help="COMET model, such as Unbabel/wmt22-comet-da; needs the comet-score command.")
    ] = None,
    supervised: Annotated[str | None, typer.Option(help="Languages with labels; default: as trained.")] = None,
    aligned: Annotated[str | None, typer.Option(help="Languages of the bitext; default: as trained.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    score_only: Annotated[bool, typer.Option(help="Score the predictions in OUTPUT; no model is needed.")] = False,
) -> None:
    """Generate answers for test files, and score them per language and group of languages."""
    with _imports():
        from mlalign.commands.evaluate import Settings, evaluate

    settings = Settings(
        output=output,
        task=task,
        model=model,
        test=tuple(test or ()),
        adapters=tuple(adapter or ()),
        backend=backend,
        precision=precision,
        beams=beams,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        trust_remote_code=trust_remote_code,
        max_rows=max_rows,
        comet=comet,
        supervised=_codes(supervised),
        aligned=_codes(aligned),
        seed=seed,
        score_only=score_only,
    )
    evaluate(settings)


@app.command()
def compare(
    evaluations: Annotated[list[Path], typer.Argument(help="What `mlalign evaluate` wrote, the baseline first.")],
    output: Annotated[Path, typer.Option(help="Directory for compare.md, compare.json and compare.png.")],
    names: Annotated[str | None, typer.Option(help="Such as task_only,aligned; by default from the paths.")] = None,
    metric: Annotated[str | None, typer.Option(help="Metric to compare; the task's main one by default.")] = None,
    supervised: Annotated[str | None, typer.Option(help="Languages with labels; default: as trained.")] = None,
    aligned: Annotated[str | None, typer.Option(help="Languages of the bitext; default: as trained.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Put evaluations side by side: differences per language and group, by paired bootstrap."""
    with _imports():
        from mlalign.commands.compare import Settings, compare

    compare(
        Settings(
            evaluations=tuple(evaluations),
            output=output,
            names=_codes(names),
            metric=metric,
            supervised=_codes(supervised),
            aligned=_codes(aligned),
            seed=seed,
        )
    )


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="A directory or hub id.")],
    data: Annotated[
        str, typer.Option(help="Parallel text: a directory with a file per language, a hub id, or bitext JSONL.")
    ],
    output: Annotated[Path, typer.Option(help="Directory for probe.json and the pictures.")],
    adapter: Annotated[str | None, typer.Option(help="A peft adapter or a RUN_DIR.")] = None,
    compare: Annotated[
        str | None, typer.Option(help="An adapter of MODEL, another model, or a RUN_DIR: before and after.")
    ] = None,
    languages: Annotated[str | None, typer.Option(help="Codes, such as eng_Latn,deu_Latn; all by default.")] = None,
    max_sentences: Annotated[int | None, typer.Option(min=5, help="Use the first N only; all by default.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to measure, such as 0-8,16; all by default; 0 = embeddings.")
    ] = None,
    pooling: Annotated[str, typer.Option(help="mean, last, or mean,last for both in the same pass.")] = "mean",
    pool_bos: Annotated[bool, typer.Option(help="Whether the mean counts BOS, as in the paper's code.")] = True,
    precision: Annotated[Precision, typer.Option(help="auto = bf16 on CUDA, else fp32.")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences per forward pass on one rank.")] = 32,
    split: Annotated[str | None, typer.Option(help="Split of a hub dataset.")] = None,
    deepspeed: Annotated[str | None, typer.Option(help="ds_configs/zero3.json shards the model over ranks.")] = None,
    keep_states: Annotated[bool, typer.Option(help="Keep OUTPUT/states at the end.")] = False,
    report: Annotated[
        list[Path] | None, typer.Option(help="What `mlalign evaluate` wrote, to correlate with; may be repeated.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Metric to correlate with; the reports' first by default.")] = None,
) -> None:
    """Measure how well translations find each other at every layer, and name the layer to align."""
    with _imports():
        from mlalign.commands.probe import Settings, probe

    settings = Settings(
        model=model,
        data=data,
        output=output,
        adapter=adapter,
        compare=compare,
        languages=_codes(languages),
        max_sentences=max_sentences,
        layers=layers,
        pooling=tuple(pooling.split(",")),
        pool_bos=pool_bos,
        precision=precision,
        trust_remote_code=trust_remote_code,
        batch_size=batch_size,
        split=split,
        deepspeed=deepspeed,
        keep_states=keep_states,
        reports=tuple(report or ()),
        metric=metric,
    )
    probe(settings)


@app.command()
def merge(
    task_adapter: Annotated[str, typer.Argument(help="An adapter's directory, or a RUN_DIR.")],
    alignment_adapter: Annotated[str, typer.Argument(help="Another one, of the same base model.")],
    output: Annotated[Path, typer.Option(help="Directory for the merged adapter.")],
    weight: Annotated[str, typer.Option(help="The alignment adapter's share, 0 to 1; auto: tuned on --dev.")] = "0.5",
    method: Annotated[
        Literal["linear", "ties", "dare_linear", "dare_ties"],
        typer.Option(help="linear is exact unless cut by --rank."),
    ] = "linear",
    layers: Annotated[int | None, typer.Option(help="Layer aligned; above it the task adapter stays whole.")] = None,
    rank: Annotated[int | None, typer.Option(help="Cut to this rank by SVD; the sum of both by default.")] = None,
    density: Annotated[float | None, typer.Option(help="ties, dare: share of entries kept; 0.5 by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="dare: random seed; 0 by default.")] = None,
    model: Annotated[str | None, typer.Option(help="The base model; by default the one the adapters name.")] = None,
    dev: Annotated[
        list[str] | None, typer.Option(help="auto: files or globs of task rows with `lang`; may be repeated.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="auto: how answers are scored, as in evaluate.")] = None,
    grid: Annotated[str | None, typer.Option(help="auto: weights to try; 0,0.1,...,1 by default.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="auto: dev rows per language; all by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="auto: as in evaluate.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="auto: as in evaluate.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Merge a task adapter and an alignment adapter, trained separately, into one."""
    with _imports():
        from mlalign.commands.merge import Settings, merge

    settings = Settings(
        task_adapter=task_adapter,
        alignment_adapter=alignment_adapter,
        output=output,
        weight=weight,
        method=method,
        layers=layers,
        rank=rank,
        density=density,
        seed=seed,
        model=model,
        dev=tuple(dev or ()),
        task=task,
        grid=grid,
        max_rows=max_rows,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        trust_remote_code=trust_remote_code,
    )
    merge(settings)


@app.command()
def prepare(
    dataset: Annotated[str, typer.Argument(help="massive, translation, uner or bitext.")],
    source: Annotated[str, typer.Argument(metavar="INPUT", help="The published data: files, an archive, or a hub id.")],
    output: Annotated[Path, typer.Argument(help="Directory for <split>.<language>.jsonl and prepare.json.")],
    form: Annotated[
        Literal["chat", "plain"] | None, typer.Option("--format", help="Format of task rows; chat by default.")
    ] = None,
    languages: Annotated[str | None, typer.Option(help="Codes as in the data, such as en,de; all by default.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Most training rows per language or pair.")] = None,
    balance: Annotated[
        bool, typer.Option("--balance", help="Cut each language's training rows to as many as the rarest has.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of sampling and of --dev.")] = 0,
    against: Annotated[
        list[str] | None, typer.Option(help="Files or globs of sentences to keep out of train; may be repeated.")
    ] = None,
    dev: Annotated[int | None, typer.Option(min=1, help="Pairs of bitext to hold out, per language pair.")] = None,
    pivot: Annotated[
        str | None, typer.Option(help="One file per language: the one others are paired with; English by default.")
    ] = None,
    directions: Annotated[
        Literal["both", "from-english", "to-english"] | None,
        typer.Option(help="translation: directions of train and dev rows; both by default."),
    ] = None,
) -> None:
    """Turn a public dataset into rows for training and evaluation, without duplicates and leaks."""
    with _imports():
        from mlalign.commands.prepare import Settings, prepare

    prepare(
        Settings(
            dataset=dataset,
            source=source,
            output=output,
            form=form,
            languages=_codes(languages),
            max_rows=max_rows,
            balance=balance,
            seed=seed,
            against=tuple(against or ()),
            dev=dev,
            pivot=pivot,
            directions=directions,
        )
    )


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="GPUs of the run; by default the launcher's ranks.")] = None,
    device: Annotated[
        Literal["cuda", "cpu"] | None,
        typer.Option(
            help="Device to plan for: cuda by default (no GPU needed here), cpu with DS_ACCELERATOR=cpu; "
            "with --measure, what this machine has."
        ),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="For the #SBATCH lines.")] = 4,
    memory_per_gpu: Annotated[float | None, typer.Option(min=0.001, help="GiB; adds advice on ZeRO.")] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Over all ranks, such as train/tokens_per_second of a run.")
    ] = None,
    measure: Annotated[int | None, typer.Option(min=1, help="Real steps to run here, for tokens per second.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
) -> None:
    """Say what a run will take before it is queued: memory, steps, disk, time, #SBATCH lines."""
    from mlalign.config import load

    loaded = load(config, overrides or [])
    with _imports():
        from mlalign.commands.plan import Settings, plan

    settings = Settings(
        config=" ".join([config, *(overrides or [])]),
        ranks=ranks,
        device=device or (None if measure else _ASKED_FOR),
        gpus_per_node=gpus_per_node,
        memory_per_gpu=memory_per_gpu,
        tokens_per_second=tokens_per_second,
        measure=measure,
        json=json,
    )
    plan(loaded, settings)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of data, base model and fine-tuning.")] = 0,
) -> None:
    """Run the whole method on embedded data: minutes on a CPU, no download."""
    with _imports():
        from mlalign.commands.demo import demo

    demo(output, seed)


@contextmanager
def _imports() -> Iterator[None]:
    """For modules of many objects and no garbage: to look for some, again and again, takes a fifth of the time."""
    gc.disable()
    try:
        yield
        gc.freeze()  # nor are they looked through later
    finally:
        gc.enable()


def _codes(text: str | None) -> list[str] | None:
    """`en, de` -> [en, de]."""
    return None if text is None else [code.strip() for code in text.split(",") if code.strip()]
