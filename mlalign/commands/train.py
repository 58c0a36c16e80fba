"""`mlalign train CONFIG [a.b=c ...]`: fine-tune and align. The same command on the same run directory resumes.

mlalign train recipe.yaml                                       one process
launch/deepspeed.sh recipe.yaml model.path=... run_dir=...      all GPUs of this machine, or NPROC=2 processes
"""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mlalign import checkpoint, distributed, model, schedule, sharding
from mlalign.compiling import compile_blocks
from mlalign.config import Config
from mlalign.dataset import Dataset, load_dataset
from mlalign.durable import write_whole
from mlalign.errors import StoppedError
from mlalign.evaluation import evaluate, to_device
from mlalign.gradients import GradientMeter
from mlalign.guards import (
    memory_said,
    refuse_diverged,
    refuse_many_skipped,
    refuse_other_rows,
    refuse_unlike,
    tell_of_skipped,
)
from mlalign.loader import Batch, Loader
from mlalign.objectives import (
    BitextChunk,
    align_backward,
    one_reduction,
    rest_untouched,
    task_backward,
)
from mlalign.packing import choose_pad
from mlalign.progress import Progress, resume, save
from mlalign.rundir import digest, held, open_run
from mlalign.tracker import Meter, Tracker, say
from mlalign.watchdog import Watchdog, meet
from mlalign.zero import fit_section, offloads_optimizer, read_deepspeed, saves_in_background


def train(config: Config) -> None:
    """Run or resume the training that `config` describes, on however many ranks there are.

    Raises StoppedError, on all ranks, where a signal asked to stop before the end, and all is saved.
    """
    distributed.init()
    meet(config.stuck_after)
    engine_config = sharding.engine_config(config, read_deepspeed(config.deepspeed))
    run_dir = Path(config.run_dir)
    config.check_ranks(distributed.world_size())
    watch = Watchdog(config.stuck_after, run_dir)
    with held(run_dir, "run_dir"), memory_said(config, lambda: (watch.phase, watch.step)):
        open_run(config, run_dir)
        _train(config, engine_config, run_dir, watch)


@dataclass
class _Run:
    """A run while it lasts: what takes part in it, and how far it is."""

    config: Config
    run_dir: Path
    engine: Any
    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    loader: Loader
    pad: int | None  #: see `packing.choose_pad`
    steps: int
    lr_factor: Callable[[int], float]
    progress: Progress
    meter: Meter
    saver: checkpoint.Saver
    tracker: Tracker
    watch: Watchdog
    asked_to_stop: Callable[[], bool]  #: called by all ranks
    kept: int  #: the step of the latest checkpoint
    unpublished: int | None = None  #: the step of a result that waits for its checkpoint
    cut_short: bool = False  #: a signal asked to stop, and something is left to do

    def at(self, phase: str) -> None:
        self.watch.at(phase, self.progress.step)


def _train(config: Config, engine_config: dict[str, Any], run_dir: Path, watch: Watchdog) -> None:
    tokenizer = model.load_tokenizer(config.model)
    layer = model.checked_layer(config)
    dataset = load_dataset(config, tokenizer)
    _say_counts(dataset)

    steps = schedule.total_steps(config, dataset.epoch_rows)
    refuse_unlike(_common(config, engine_config, dataset, steps))
    engine = _make_engine(config, engine_config, layer)
    if distributed.is_main():
        write_whole(run_dir / "deepspeed.json", json.dumps(engine.config, indent=2) + "\n")
    pad = choose_pad(engine, config.model, tokenizer)
    say(_describe(engine, config, layer, steps, packed=pad is None))

    meter = Meter()
    progress = resume(engine, dataset, meter, run_dir, config.seed, steps)
    checkpoint.publish(engine, run_dir, progress.best_step)  # a run may have been killed before it came to it
    engine.module.register_forward_pre_hook(lambda *_: watch.touch())
    dataset.tick = watch.touch
    loader = Loader(config, dataset.orders, pad, progress.step, steps, model.vocabulary(engine.module.lm))
    in_background = saves_in_background(config, distributed.uses_cuda(), offloads_optimizer(engine_config))
    with distributed.StopSignals() as signals, closing(loader), watch:
        run = _Run(
            config=config,
            run_dir=run_dir,
            engine=engine,
            tokenizer=tokenizer,
            dataset=dataset,
            loader=loader,
            pad=pad,
            steps=steps,
            lr_factor=schedule.lr_factor(config, steps),
            progress=progress,
            meter=meter,
            saver=checkpoint.Saver(engine, run_dir, in_background, watch.touch),
            tracker=Tracker(run_dir, progress.step, steps),
            watch=watch,
            asked_to_stop=lambda: distributed.any_rank(signals.received),
            kept=progress.step,
        )
        if progress.step == 0:
            run.tracker.text("config", (run_dir / "config.yaml").read_text())
        engine.train()
        meter.restart_clock()
        while _goes_on(run):
            _take_step(run)
    run.tracker.close()
    if any(section and section.streaming for section in (config.task, config.alignment)):
        _say_counts(dataset)
    if run.cut_short:
        raise StoppedError(f"after step {progress.step}")
    say(_farewell(progress, run_dir, steps))


def _goes_on(run: _Run) -> bool:
    """Between two steps: evaluate, export and save what is due. Returns whether another step follows."""
    progress, config = run.progress, run.config
    run.at("decisions")
    stop = run.asked_to_stop()
    run.saver.poll()
    evaluated, improved = None, False
    if progress.evaluation_due(config, run.steps) and run.dataset.has_dev and not stop:
        run.at("evaluation")
        dev = run.dataset.task_dev, run.dataset.bitext_dev
        evaluated = evaluate(run.engine, config, *dev, run.pad, run.asked_to_stop)
        stop = evaluated is None
        run.meter.restart_clock()
    if evaluated:
        run.tracker.log(progress.step, evaluated)
        improved = progress.judge(evaluated, config.evaluation.patience)

    finished = progress.step == run.steps or progress.stopped_early
    owed = finished and run.dataset.has_dev and progress.evaluation_due(config, run.steps)
    new = progress.step > run.kept
    unexported = finished and progress.best is None and (new or not checkpoint.exported(run.engine, run.run_dir))
    if improved or (unexported and not stop):
        run.at("export")
        if run.unpublished is not None:  # its checkpoint is still on its way, and the next result takes its place
            run.saver.finish()
            _publish(run)
        run.unpublished = progress.step
        about = {"step": progress.step, **run.dataset.languages()}
        checkpoint.export(run.engine, run.tokenizer, run.run_dir, about, run.watch.touch)
    due = finished or stop or progress.step % config.checkpoint_every == 0
    if evaluated or (due and new):
        run.at("checkpoint")
        refuse_other_rows(run.loader.digest, progress.step)
        save(run.saver, run.dataset, run.loader, run.meter, progress, run.steps)
        run.kept = progress.step
        run.meter.restart_clock()
    if finished or stop:
        run.saver.finish()
    if run.unpublished is not None and not run.saver.pending:
        _publish(run)
    run.cut_short = stop and (owed or unexported or not finished)
    return not (finished or stop)


def _publish(run: _Run) -> None:
    checkpoint.publish(run.engine, run.run_dir, run.unpublished)
    run.unpublished = None


def _take_step(run: _Run) -> None:
    """One optimizer step: its batches, forward and backward; the update; and at log steps what there is to log."""
    progress, config, number = run.progress, run.config, run.progress.step + 1
    run.watch.at("data", number)
    log_now = number % config.log_every == 0 or number == run.steps
    batches, mark = run.loader.take(), run.meter.mark()
    both = len({batch.objective for batch in batches}) == 2
    with GradientMeter(run.engine.module, wanted=log_now and both and config.log_gradients) as gradients:
        told = (lambda objective: run.watch.at(f"{objective} batch", number), gradients.begin)
        with_task = _backward(run.engine, config, batches, run.meter, *told)
    run.watch.at("optimizer", number)
    lr = config.optimizer.lr * run.lr_factor(progress.step)
    grad_norm = _optimizer_step(run.engine, lr, with_task, measure=log_now)
    progress.count(taken=sharding.step_was_taken(run.engine))
    run.tracker.advance(progress.step)
    if progress.skipped_in_a_row:
        dealt = [(batch.objective, batch.dealt) for batch in batches]
        tell_of_skipped(progress.step, run.meter.back_to(mark), dealt, run.tokenizer, run.run_dir)
        refuse_many_skipped(progress.skipped_in_a_row, config.optimizer.max_skipped_steps, progress.step, run.run_dir)
    if log_now:
        refuse_other_rows(run.loader.digest, progress.step)
        refuse_diverged(run.engine.module.lm, progress.step, run.run_dir)
        values = {"train/lr": lr, "train/epoch": _epochs(run.loader, run.dataset)}
        run.tracker.log(progress.step, run.meter.read() | values | _step_values(progress, grad_norm, gradients))


def real_steps(config: Config) -> Iterator[Meter]:
    """Take a real step for every item that is asked for, without end; nothing is written. Called by all ranks.

    With `log_gradients` every step compares gradients, as only log steps do in training.
    """
    distributed.init()
    engine_config = sharding.engine_config(config, read_deepspeed(config.deepspeed))
    tokenizer = model.load_tokenizer(config.model)
    dataset = load_dataset(config, tokenizer)
    engine = _make_engine(config, engine_config, model.checked_layer(config))
    meter = Meter()
    with closing(Loader(config, dataset.orders, choose_pad(engine, config.model, tokenizer))) as loader:
        engine.train()
        while True:
            with GradientMeter(engine.module, wanted=config.log_gradients) as gradients:
                with_task = _backward(engine, config, loader.take(), meter, gradients.begin)
            _optimizer_step(engine, config.optimizer.lr, with_task, measure=False)
            gradients.read()
            yield meter


def measure(config: Config, steps: int) -> dict[str, float]:
    """Run so many steps after a first one, on the ranks here; nothing is written. Called by all ranks.

    Returns: tokens_per_second over all ranks, and memory: the peak in bytes, of rank 0's GPU or process.
    """
    running = real_steps(config.model_copy(update={"log_gradients": False}))  # which few steps are slowed by
    next(running).restart_clock()  # the first compiles, records and allocates
    for _ in range(steps):
        meter = next(running)
    values = meter.read()
    return {"tokens_per_second": values["train/tokens_per_second"], "memory": values["train/memory_gib"] * 2**30}


def _backward(engine, config: Config, batches: list[Batch], meter: Meter, *told: Callable[[str], None]) -> bool:
    """All forward and backward passes of one optimizer step; all of `told` are called with each batch's objective.

    Returns: whether a task batch was among them.
    """
    with one_reduction(engine):
        for batch in batches:
            for tell in told:
                tell(batch.objective)
            backward = _task_batch if batch.objective == "task" else _alignment_batch
            backward(engine, config, batch, meter)
    return batches[0].objective == "task"


def _task_batch(engine, config: Config, batch: Batch, meter: Meter) -> None:
    passes = [to_device(inputs, engine.device) for inputs in batch.micro_batches]
    loss = task_backward(engine, passes, batch.size, batch.weight)
    meter.add("task", loss, tokens=batch.tokens, positions=batch.positions)


def _alignment_batch(engine, config: Config, batch: Batch, meter: Meter) -> None:
    chunks = [
        BitextChunk(
            [to_device(inputs, engine.device) for inputs in passes], to_device({"keys": keys}, engine.device)["keys"]
        )
        for passes, keys in batch.micro_batches
    ]
    loss = align_backward(engine, chunks, config.alignment, batch.weight)
    ranks = distributed.world_size()
    meter.add("alignment", loss / ranks, tokens=batch.tokens, positions=batch.positions, pairs=batch.size // ranks)


def _optimizer_step(engine, lr: float, with_task: bool, measure: bool) -> float | None:
    """Clip, update, clear. Returns the global gradient norm before clipping where `measure` asks for it."""
    if not with_task:
        rest_untouched(engine)
    sharding.set_lr(engine.optimizer, lr, rest_above=not with_task)
    engine.step()
    sharding.forget_modules(engine)
    return sharding.grad_norm(engine) if measure else None


def _common(config: Config, engine_config: dict[str, Any], dataset: Dataset, steps: int) -> dict[str, object]:
    """What all ranks must have read alike, before they wait for each other over it."""
    counts = {f"rows of {name}": counts.rows for name, counts in dataset.counts.items()}
    hashes = {"config": digest(config.without_paths()), "DeepSpeed config": digest(engine_config)}
    return counts | {"steps": steps} | {f"hash of the {name}": value for name, value in hashes.items()}


def _epochs(loader: Loader, dataset: Dataset) -> float:
    """Passes over the task rows so far, over the pairs where there is no task; whole ones of a stream."""
    state = loader.state().get("task") or loader.state()["alignment"]
    return state["epoch"] + (state["position"] / dataset.epoch_rows if dataset.epoch_rows else 0)


def _step_values(progress: Progress, grad_norm: float, gradients: GradientMeter) -> dict[str, float]:
    """What there is to log of the last step: nothing of its gradients if it was skipped. Called by all ranks."""
    values = {} if progress.skipped_in_a_row else {"train/grad_norm": grad_norm} | gradients.read()
    return values | ({"train/skipped_steps": progress.skipped} if progress.skipped else {})


def _make_engine(config: Config, engine_config: dict[str, Any], layer: int):
    lm = model.load_lm(config.model, engine_config)
    if config.lora:
        torch.manual_seed(config.seed)  # the same adapters on every rank and ZeRO stage
        lm = model.add_lora(lm, config.lora)
    if config.model.compile:
        compile_blocks(lm)
    aligned = model.AlignedModel(lm, layer, config.alignment.pooling if config.alignment else "mean")
    groups = sharding.parameter_groups(aligned, config.optimizer.weight_decay)
    sizes = [getattr(p, "ds_numel", p.numel()) for group in groups for p in group["params"]]
    section = fit_section(engine_config["zero_optimization"], sizes, adapters=config.lora is not None)
    engine_config = engine_config | {"zero_optimization": section}
    optimizer = sharding.make_optimizer(config, groups, engine_config)
    return sharding.make_engine(aligned, optimizer, engine_config)


def _say_counts(dataset: Dataset) -> None:
    for name, counts in dataset.counts.items():
        say(f"{name}: {counts}")


def _describe(engine, config: Config, layer: int, steps: int, packed: bool) -> str:
    """One line on what is about to be trained, and how."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in engine.module.parameters()]
    parts = [
        f"{sum(size for size, _ in sizes) / 1e6:,.1f}M parameters",
        f"{sum(size for size, trainable in sizes if trainable) / 1e6:,.2f}M trainable",
        f"{distributed.world_size()} ranks, ZeRO-{engine.zero_optimization_stage()}",
        str(model.precision_dtype(config.model.precision)).removeprefix("torch."),
        f"{steps} steps",
    ]
    if packed:
        parts.append("packed")
    if config.alignment:
        parts.append(f"aligned at layer {layer}, {config.interleave.mode} {config.interleave.ratio}")
    return ", ".join(parts)


def _farewell(progress: Progress, run_dir: Path, steps: int) -> str:
    end = f"stopped early at step {progress.step}" if progress.stopped_early else f"done, {steps} steps"
    best = f"; best dev loss {progress.best:.4f} at step {progress.best_step}" if progress.best is not None else ""
    return f"{end}{best}; results in {run_dir}; watch with: tensorboard --logdir {run_dir}"
