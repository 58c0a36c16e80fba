"""`mlalign train CONFIG [a.b=c ...]`: fine-tune and align. The same command on the same run directory resumes.

mlalign train recipe.yaml                                       one process
launch/deepspeed.sh recipe.yaml model.path=... run_dir=...      all GPUs of this machine, or NPROC=2 processes
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mlalign import checkpoint, distributed, model, schedule, sharding
from mlalign.compiling import compile_blocks
from mlalign.config import Config
from mlalign.dataset import Dataset, load_dataset
from mlalign.durable import write_whole
from mlalign.errors import StoppedError, UserError
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
    random_state,
    rest_untouched,
    set_random_state,
    task_backward,
)
from mlalign.packing import choose_pad
from mlalign.rundir import digest, held, open_run
from mlalign.tracker import Meter, Tracker, say
from mlalign.watchdog import Watchdog
from mlalign.zero import offloads_optimizer, read_deepspeed


@dataclass
class Progress:
    """How far the run is, and how well it does on dev. Saved with every checkpoint."""

    step: int = 0
    best: float | None = None  #: the smallest dev loss so far (task loss; alignment loss where there is no task dev)
    best_step: int = 0
    evaluations_since_best: int = 0
    evaluated_step: int = 0  #: a run stopped by a signal where an evaluation is due begins again with it
    stopped_early: bool = False
    skipped: int = 0  #: steps that were left out
    skipped_in_a_row: int = 0  #: of them, the last ones

    def evaluation_due(self, config: Config, steps: int) -> bool:
        """Whether to evaluate now: every so many steps and after the last, once each."""
        at_step = self.step % config.evaluation.every == 0 or self.step == steps
        return at_step and self.step > self.evaluated_step

    def count(self, taken: bool) -> None:
        """Take in a step."""
        self.step += 1
        self.skipped += not taken
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1

    def judge(self, values: dict[str, float], patience: int) -> bool:
        """Take in an evaluation; returns whether it is the best so far."""
        loss = values.get("dev/task_loss", values.get("dev/alignment_loss"))
        improved = not math.isnan(loss) and (self.best is None or loss < self.best)
        if improved:
            self.best, self.best_step, self.evaluations_since_best = loss, self.step, 0
        else:
            self.evaluations_since_best += 1
        self.evaluated_step = self.step
        self.stopped_early = 0 < patience <= self.evaluations_since_best
        return improved


def train(config: Config) -> None:
    """Run or resume the training that `config` describes, on however many ranks there are.

    Raises StoppedError, on all ranks, where a signal asked to stop before the end, and all is saved.
    """
    distributed.init()
    engine_config = sharding.engine_config(config, read_deepspeed(config.deepspeed))
    run_dir = Path(config.run_dir)
    config.check_ranks(distributed.world_size())
    watch = Watchdog(config.stuck_after, run_dir)
    with held(run_dir, "run_dir"), memory_said(config, lambda: (watch.phase, watch.step)):
        open_run(config, run_dir)
        _train(config, engine_config, run_dir, watch)


def _train(config: Config, engine_config: dict[str, Any], run_dir: Path, watch: Watchdog) -> None:
    tokenizer = model.load_tokenizer(config.model)
    layer = model.checked_layer(config)
    dataset = load_dataset(config, tokenizer)
    _say_counts(dataset)

    if distributed.is_main():
        write_whole(run_dir / "deepspeed.json", json.dumps(engine_config, indent=2) + "\n")
    steps = schedule.total_steps(config, dataset.epoch_rows)
    refuse_unlike(_common(config, engine_config, dataset, steps))
    engine = _make_engine(config, engine_config, layer)
    lr_factor = schedule.lr_factor(config, steps)
    pad = choose_pad(engine, config.model, tokenizer)
    say(_describe(engine, config, layer, steps, packed=pad is None))

    meter = Meter()
    progress = _resume(engine, dataset, meter, run_dir, config.seed, steps)
    kept = progress.step  # what the latest checkpoint holds
    engine.module.register_forward_pre_hook(lambda *_: watch.touch())
    checkpoint.publish(engine, run_dir, progress.best_step)  # a run may have been killed before it came to it
    unpublished = None  # the step of a result that waits for its checkpoint
    saver = checkpoint.Saver(engine, run_dir, _saves_in_background(config, engine_config), watch.touch)
    tracker = Tracker(run_dir, progress.step, steps)
    if progress.step == 0:
        tracker.text("config", (run_dir / "config.yaml").read_text())

    dataset.tick = watch.touch
    loader = Loader(config, dataset.orders, pad, progress.step, steps, model.vocabulary(engine.module.lm))
    with distributed.StopSignals() as signals, closing(loader), watch:

        def asked_to_stop() -> bool:
            return distributed.any_rank(signals.received)

        def at_batch(objective: str) -> None:
            watch.at(f"{objective} batch", progress.step + 1)

        engine.train()
        meter.restart_clock()
        while True:
            watch.at("decisions", progress.step)
            stop = asked_to_stop()
            saver.poll()
            improved = False
            evaluated = None
            if progress.evaluation_due(config, steps) and dataset.has_dev and not stop:
                watch.at("evaluation", progress.step)
                evaluated = evaluate(engine, config, dataset.task_dev, dataset.bitext_dev, pad, asked_to_stop)
                stop = evaluated is None
                meter.restart_clock()
            if evaluated:
                tracker.log(progress.step, evaluated)
                improved = progress.judge(evaluated, config.evaluation.patience)
            finished = progress.step == steps or progress.stopped_early
            owed = finished and dataset.has_dev and progress.evaluation_due(config, steps)
            unexported = (
                finished
                and progress.best is None
                and (progress.step > kept or not checkpoint.exported(engine, run_dir))
            )
            if improved or (unexported and not stop):
                watch.at("export", progress.step)
                unpublished = progress.step
                about = {"step": unpublished, **dataset.languages()}
                checkpoint.export(engine, tokenizer, run_dir, about, watch.touch)
            due = finished or stop or progress.step % config.checkpoint_every == 0
            if evaluated or (due and progress.step > kept):
                watch.at("checkpoint", progress.step)
                refuse_other_rows(loader.digest, progress.step)
                _save(saver, dataset, loader, meter, progress, steps)
                kept = progress.step
                meter.restart_clock()
            if finished or stop:
                saver.finish()
            if unpublished is not None and not saver.pending:
                checkpoint.publish(engine, run_dir, unpublished)
                unpublished = None
            if finished or stop:
                break

            watch.at("data", progress.step + 1)
            log_now = (progress.step + 1) % config.log_every == 0 or progress.step + 1 == steps
            batches, mark = loader.take(), meter.mark()
            both = len({batch.objective for batch in batches}) == 2
            with GradientMeter(engine.module, wanted=log_now and both and config.log_gradients) as gradients:
                with_task = _backward(engine, config, batches, meter, at_batch, gradients.begin)
            watch.at("optimizer", progress.step + 1)
            lr = config.optimizer.lr * lr_factor(progress.step)
            grad_norm = _optimizer_step(engine, lr, with_task, measure=log_now)
            progress.count(taken=sharding.step_was_taken(engine))
            tracker.advance(progress.step)
            if progress.skipped_in_a_row:
                dealt = [(batch.objective, batch.dealt) for batch in batches]
                tell_of_skipped(progress.step, meter.back_to(mark), dealt, tokenizer, run_dir)
                limit = config.optimizer.max_skipped_steps
                refuse_many_skipped(progress.skipped_in_a_row, limit, progress.step, run_dir)
            if log_now:
                refuse_other_rows(loader.digest, progress.step)
                refuse_diverged(engine.module.lm, progress.step, run_dir)
                values = {"train/lr": lr, "train/epoch": _epochs(loader, dataset)}
                tracker.log(progress.step, meter.read() | values | _step_values(progress, grad_norm, gradients))
    tracker.close()
    if any(section and section.streaming for section in (config.task, config.alignment)):
        _say_counts(dataset)
    if stop and (owed or unexported or not finished):
        raise StoppedError(f"after step {progress.step}")
    say(_farewell(progress, run_dir, steps))


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
    """What there is to log of the last step: nothing of its gradients if it was left out. Called by all ranks."""
    values = {} if progress.skipped_in_a_row else {"train/grad_norm": grad_norm} | gradients.read()
    return values | ({"train/skipped_steps": progress.skipped} if progress.skipped else {})


def _saves_in_background(config: Config, engine_config: dict[str, Any]) -> bool:
    if config.async_checkpoint != "auto":
        return config.async_checkpoint
    return distributed.uses_cuda() and not offloads_optimizer(engine_config)  # else host memory holds it all already


def _save(
    saver: checkpoint.Saver, dataset: Dataset, loader: Loader, meter: Meter, progress: Progress, steps: int
) -> None:
    state = {"progress": asdict(progress), "orders": loader.state()}
    state |= {"sizes": _sizes(dataset, steps), "digests": dataset.digests}
    own = {f"random_state.{number}": each for number, each in enumerate(random_state())}
    own |= {f"losses.{objective}": losses for objective, losses in meter.losses().items()}
    saver.save(progress.step, state, own, keep={progress.best_step})


def _sizes(dataset: Dataset, steps: int) -> dict[str, int]:
    """What must be as it was when a run goes on, or the saved places in the orders mean other rows."""
    return {f"rows of {name}.train": count for name, count in dataset.rows.items()} | {"steps": steps}


def _resume(engine, dataset: Dataset, meter: Meter, run_dir: Path, seed: int, steps: int) -> Progress:
    """Go back to the latest checkpoint, or start. Raises UserError where the data is not what it was."""
    name = checkpoint.newest_whole(run_dir)
    if name is None:
        _seed(seed, step=0)
        return Progress()
    state = checkpoint.load(engine, run_dir, name)
    began, sizes = state["sizes"], _sizes(dataset, steps)
    changed = [what for what in began if began[what] != sizes.get(what, 0)]
    if changed:
        then = ", ".join(f"{began[what]} {what}" for what in changed)
        now = ", ".join(f"{sizes.get(what, 0)}" for what in changed)
        raise UserError(
            f"{run_dir} was started with {then}, now the data gives {now}: put the data back, or choose another run_dir"
        )
    edited = [name for name, digest in state["digests"].items() if digest != dataset.digests.get(name, digest)]
    if edited:
        raise UserError(
            f"the rows of {edited[0]}.train are not those that {run_dir} was started with, though as many: put the "
            "data back (and the tokenizer), or choose another run_dir"
        )
    for objective, order in dataset.orders.items():
        order.restore(state["orders"][objective])
    before = state["world_size"]
    if before == distributed.world_size():
        own = checkpoint.load_own(run_dir, name, distributed.rank())
        set_random_state([own[key] for key in sorted(own) if key.startswith("random_state.")])
        losses = _losses(own)
    else:  # ranks that there were not, or are not: other dropout, and all losses since the last log step are rank 0's
        _seed(seed, state["step"])
        every = [_losses(checkpoint.load_own(run_dir, name, rank)) for rank in range(before)]
        losses = {key: sum(each[key] for each in every) * distributed.is_main() for key in every[0]}
    meter.restore(losses, engine.device)
    saved = f"saved by {before} ranks with ZeRO-{state['zero_stage']}"
    say(f"resumed from {run_dir / 'checkpoints' / name}, {saved}")
    return Progress(**state["progress"])


def _losses(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("losses."): value for key, value in own.items() if key.startswith("losses.")}


def _seed(seed: int, step: int) -> None:
    """Dropout differs between ranks."""
    torch.manual_seed(seed * 1_000_003 + step * 1_009 + distributed.rank())


def _make_engine(config: Config, engine_config: dict[str, Any], layer: int):
    lm = model.load_lm(config.model, engine_config)
    if config.lora:
        torch.manual_seed(config.seed)  # the same adapters on every rank and ZeRO stage
        lm = model.add_lora(lm, config.lora)
    if config.model.compile:
        compile_blocks(lm)
    aligned = model.AlignedModel(lm, layer, config.alignment.pooling if config.alignment else "mean")
    groups = sharding.parameter_groups(aligned, config.optimizer.weight_decay)
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
