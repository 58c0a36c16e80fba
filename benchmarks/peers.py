"""mlalign's training step beside those of what people use today: `python benchmarks/peers.py`.

Needs `pip install -c constraints.txt -e '.[benchmarks]'` and 8 GiB of memory. A made-up Llama with LoRA on one rank of
this machine, every contestant in a process of its own, one step of each in turn, over whole epochs of the same rows:

task        mlalign, TRL's SFTTrainer and transformers' Trainer learn completions
contrast    mlalign and sentence-transformers find each sentence's translation, in one pass or in chunks of a batch

Equal are the model and its fp32 weights, the tokens, what is learned of them, LoRA, AdamW and its settings, clipping,
the loss and the batch sizes. Before anything is timed, every contestant takes a step over all rows at once with a
smaller model, and all must find the same loss. What a step includes is what each of them does in it: choosing and
padding rows, the passes, clipping, the update, its log.

Not equal is what each makes of that:

- mlalign puts rows of like lengths together, within 50 batches; rows of the others come in random order. "By length"
  gives the Trainers what `train_sampling_strategy="group_by_length"` does on thousands of rows, which it sorts within
  50 batches as well; on as few as there are here its windows would be shorter than mlalign's.
- TRL logs entropy and accuracy in every step. Gradient checkpointing, which it turns on unless told otherwise, is off.
  Its padding-free batches need flash attention and a GPU.
- sentence-transformers has no way to group pairs by length, and tokenises in every step. It encodes with all L blocks,
  mlalign with the first k: k = L / 2 is what it does by default, k = L shows what else differs. The final norm, which
  an alignment pass does not have, is taken out of both.
- A pass over 32 pairs holds both of their sides in mlalign, one side of them in sentence-transformers.

Seconds are of processor time, each contestant on one thread: waiting for other work on the machine does not count.
Memory is VmHWM of /proc, the largest resident memory of a process, less what was resident before the model was loaded:
libraries do not count, because the smaller model went through the same code before. The mean loss gives every step the
same weight, however many tokens it has, and pairs of like lengths are harder to tell apart.
"""

import ctypes
import gc
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"  # with more, threads that wait for each other would be counted as busy
# Before any import, or the libraries would talk between the tables.
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}

from byte_llama import save_byte_llama
from resident import forget_peak, resident
from rich.console import Console
from rich.table import Table

MIB = 2**20
HIDDEN, BLOCKS, VOCABULARY, SMALL_BLOCKS = 128, 8, 4_000, 2
ROWS, EPOCHS = 256, 5
LR = 5e-4
LENGTHS = {"task": 512, "alignment": 128}  #: tokens: the longest rows stay below
console = Console(width=110)


@dataclass(frozen=True)
class Work:
    """What a contestant has to do."""

    model: str
    rows: str
    layer: int  #: blocks that mlalign aligns through
    batch: int  #: rows of a step
    micro: int  #: rows of a pass
    steps: int
    by_length: bool = False  #: put the longest rows first and keep that order, where it is a choice


# ------------------------------------------------------------------------------------------------------ contestants
# Each takes work.steps steps, calls `after_step` after every one, and returns their mean loss.


def mlalign_task(work: Work, after_step: Callable[[], None]) -> float:
    section = {"train": work.rows, "batch_size": work.batch, "micro_batch_size": work.micro}
    return mlalign(work, after_step, {"task": section, "interleave": {"ratio": "1:0"}})


def mlalign_contrast(work: Work, after_step: Callable[[], None]) -> float:
    section = {"train": work.rows, "batch_size": work.batch, "micro_batch_size": work.micro, "layer": work.layer}
    return mlalign(work, after_step, {"alignment": section, "interleave": {"ratio": "0:1"}})


def mlalign(work: Work, after_step: Callable[[], None], changes: dict) -> float:
    from mlalign.commands.train import real_steps
    from mlalign.config import Config

    values = {
        "run_dir": work.model,
        "model": {"path": work.model, "precision": "fp32"},
        "lora": {"r": 8, "dropout": 0},
        "optimizer": {"steps": work.steps, "lr": LR},
    }
    running = real_steps(Config.model_validate(values | changes))
    for _ in range(work.steps):
        meter = next(running)
        after_step()
    return next(value for name, value in meter.read().items() if name.endswith("_loss"))


def trl_task(work: Work, after_step: Callable[[], None]) -> float:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [{name: row[name] for name in ("prompt", "completion")} for row in read_rows(work)]
    settings = trainer_settings(work) | {"bf16": False, "gradient_checkpointing": False}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(work.model),
        args=SFTConfig(max_length=LENGTHS["task"], **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        peft_config=lora(),
    )
    return train(trainer, after_step)


def trainer_task(work: Work, after_step: Callable[[], None]) -> float:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(work.model)

    def encode(row: dict) -> dict:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

    trainer = Trainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(work.model), lora()),
        args=TrainingArguments(**trainer_settings(work)),
        train_dataset=[encode(row) for row in read_rows(work)],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    return train(trainer, after_step)


def sentence_transformers_contrast(work: Work, after_step: Callable[[], None]) -> float:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, losses
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.models import Pooling, Transformer
    from torch import nn

    decoder = Transformer(work.model, max_seq_length=LENGTHS["alignment"])
    model = SentenceTransformer(modules=[decoder, Pooling(decoder.get_embedding_dimension(), "mean")], device="cpu")
    decoder.auto_model.norm = nn.Identity()
    model.add_adapter(lora())
    settings = {"scale": 10, "directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    if work.micro < work.batch:
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=work.micro, **settings)
    else:
        loss = losses.MultipleNegativesRankingLoss(model, **settings)
    pairs = [{"anchor": row["src"], "positive": row["tgt"]} for row in read_rows(work)]
    arguments = Arguments(**trainer_settings(replace(work, micro=work.batch)))
    trainer = SentenceTransformerTrainer(model, arguments, Dataset.from_list(pairs), loss=loss)
    return train(trainer, after_step)


def lora():
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0, target_modules="all-linear")


def trainer_settings(work: Work) -> dict:
    return {
        "output_dir": f"{work.model}/trainer",
        "max_steps": work.steps,
        "per_device_train_batch_size": work.micro,
        "gradient_accumulation_steps": work.batch // work.micro,
        "train_sampling_strategy": "sequential" if work.by_length else "random",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train(trainer, after_step: Callable[[], None]) -> float:
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    class AfterStep(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            after_step()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(AfterStep())
    return trainer.train().training_loss


def read_rows(work: Work) -> list[dict]:
    rows = [json.loads(line) for line in Path(work.rows).read_text().splitlines()]
    return (
        sorted(rows, key=lambda row: len(row["prompt"] + row["completion"]), reverse=True) if work.by_length else rows
    )


# ---------------------------------------------------------------------------------------------------------- measuring


class Contestant:
    """A process that takes a step when it is told to."""

    def __init__(self, name: str, run: Callable, check: Work, work: Work) -> None:
        self.name = name
        self.epoch_steps = ROWS // work.batch
        self.seconds: list[float] = []  #: of each epoch
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, run, check, work), daemon=True)
        self._process.start()
        other.close()  # so that the end of the process is an end of file here

    def check(self) -> float:
        """The loss of the check."""
        return self._pipe.recv()

    def step(self) -> float:
        """Seconds of processor time that a step took."""
        self._pipe.send("go")
        return self._pipe.recv()

    def finish(self) -> None:
        self._pipe.send("go")
        self.loss, self.memory = self._pipe.recv()
        self._process.join()


def serve(pipe, run: Callable, check: Work, work: Work) -> None:
    """Check, then work; the first "go" loads the model, the last one asks for the result."""
    check_loss = run(check, lambda: None)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps for later would be used and not counted
    forget_peak()
    before = resident("VmRSS")
    pipe.send(check_loss)
    pipe.recv()

    began = time.process_time()

    def after_step() -> None:
        nonlocal began
        pipe.send(time.process_time() - began)
        pipe.recv()
        began = time.process_time()

    loss = run(work, after_step)
    pipe.send((loss, resident("VmHWM") - before))


def race(contestants: list[Contestant]) -> None:
    """All epochs of all contestants, one step of each in turn; the first epoch loads and allocates."""
    losses = [contestant.check() for contestant in contestants]
    assert max(losses) < 1.001 * min(losses), f"not the same task: {losses}"
    for epoch in range(1 + EPOCHS):
        seconds = [0.0] * len(contestants)
        for _ in range(contestants[0].epoch_steps):
            for number, contestant in enumerate(contestants):
                seconds[number] += contestant.step()
        if epoch:
            for contestant, taken in zip(contestants, seconds):
                contestant.seconds.append(taken)
    for contestant in contestants:
        contestant.finish()


def write_rows(folder: Path) -> None:
    """Task rows with a long tail of lengths, and pairs with lengths like Tatoeba's, in bytes."""
    rng = random.Random(0)

    def text(length: float, least: int, most: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(min(max(round(length), least), most)))

    def task() -> dict:
        prompt, completion = rng.lognormvariate(math.log(100), 0.7), rng.lognormvariate(math.log(20), 0.5)
        return {"prompt": text(prompt, 20, 300), "completion": text(completion, 4, 60), "lang": "en"}

    def pair() -> dict:
        src = rng.lognormvariate(math.log(32), 0.5)
        tgt = src * rng.lognormvariate(0, 0.2)
        return {"src": text(src, 8, 80), "tgt": text(tgt, 8, 80), "src_lang": "es", "tgt_lang": "en"}

    for name, make in (("task", task), ("alignment", pair)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(make()) + "\n" for _ in range(ROWS)))


def save_model(folder: Path, hidden: int, blocks: int, vocabulary: int) -> str:
    """The wide initial weights make every token's loss another, so that equal means are no chance."""
    return save_byte_llama(
        folder,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )


def show(contestants: list[Contestant], unit: str, count: int) -> list[float]:
    """Print a table, `count` being the units of an epoch. Returns: the time of each, the first one's being 1."""
    table = Table("contestant", "seconds an epoch", f"{unit}/s", "ratio of times", "peak, MiB", "mean loss")
    first, ratios = contestants[0], []
    for each in contestants:
        ratios.append(statistics.median(a / b for a, b in zip(each.seconds, first.seconds)))
        seconds = statistics.median(each.seconds)
        shown = (f"{seconds:.2f}", f"{count / seconds:,.0f}", f"{ratios[-1]:.2f}")
        table.add_row(each.name, *shown, f"{each.memory / MIB:.0f}", f"{each.loss:.3f}")
    console.print(table)
    return ratios


def compare_tasks(small: str, large: str, rows: Path) -> None:
    check = Work(small, str(rows), layer=SMALL_BLOCKS, batch=ROWS, micro=8, steps=1)
    work = Work(large, str(rows), layer=BLOCKS, batch=32, micro=8, steps=(1 + EPOCHS) * ROWS // 32)
    contestants = [Contestant("mlalign", mlalign_task, check, work)]
    for name, run in (("TRL SFTTrainer", trl_task), ("transformers Trainer", trainer_task)):
        sorted_check, sorted_work = (replace(each, by_length=True) for each in (check, work))
        contestants.append(Contestant(name, run, check, work))
        contestants.append(Contestant(f"{name}, by length", run, sorted_check, sorted_work))
    race(contestants)
    tokens = sum(len(row["prompt"]) + len(row["completion"]) + 2 for row in read_rows(work))  # bytes, BOS, EOS
    show(contestants, "tokens", tokens)


def compare_contrasts(small: str, large: str, rows: Path, batch: int, micro: int) -> None:
    once = ROWS if micro == batch else micro
    check = Work(small, str(rows), layer=SMALL_BLOCKS, batch=ROWS, micro=once, steps=1)
    work = Work(large, str(rows), layer=BLOCKS, batch=batch, micro=micro, steps=(1 + EPOCHS) * ROWS // batch)
    half = replace(work, layer=BLOCKS // 2)
    contestants = [
        Contestant(f"mlalign, {half.layer} blocks", mlalign_contrast, check, half),
        Contestant(f"mlalign, {work.layer} blocks", mlalign_contrast, check, work),
        Contestant(f"sentence-transformers, {work.layer} blocks", sentence_transformers_contrast, check, work),
    ]
    race(contestants)
    console.print(f"{batch} pairs a step, {micro} a pass:")
    _, whole, theirs = show(contestants, "pairs", ROWS)
    console.print(f"{theirs:.2f} = {whole:.2f} for the blocks above the layer x {theirs / whole:.2f} for the rest\n")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="peers-benchmark-") as name:
        folder = Path(name)
        small = save_model(folder / "small", 16, SMALL_BLOCKS, vocabulary=300)
        large = save_model(folder / "large", HIDDEN, BLOCKS, VOCABULARY)
        write_rows(folder)
        compare_tasks(small, large, folder / "task.jsonl")
        compare_contrasts(small, large, folder / "alignment.jsonl", batch=64, micro=64)
        compare_contrasts(small, large, folder / "alignment.jsonl", batch=256, micro=32)


if __name__ == "__main__":
    main()
