"""Small language models, trained from scratch in minutes: what stands in for a pretrained LLM in demo and benchmarks.

Nothing in their training tells them which sentences are translations of each other. Matrices are trained by Muon, which
needs half the time of AdamW for the same loss here, all else by AdamW. An interrupted training goes on.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_MATRIX_LR, _LR = 0.02, 3e-3  #: of Muon, and of AdamW
_STATE_EVERY = 250  #: steps


@dataclass(frozen=True)
class Shape:
    """Of a Llama and its tokenizer."""

    hidden: int = 128
    intermediate: int = 352
    layers: int = 6
    heads: int = 4
    vocabulary: int = 2400
    max_tokens: int = 128


def train_base(
    sentences: list[str],
    directory: Path,
    seed: int,
    shape: Shape = Shape(),
    *,
    steps: int = 600,
    batch_size: int = 64,
    device: str = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Train tokenizer and model on `sentences`, and save both as `directory`, as any Hugging Face model.

    Until it is whole it lies in `directory`.partial, from where a training with the same arguments goes on.
    batch_size is in sentences, which are cut at `shape.max_tokens`. The learning rate rises over the first tenth of the
    steps and then falls along a cosine. `progress(step, loss)` is called after every step, loss in nats per token.
    Equal arguments and an equal number of threads give an equal model. On a GPU forward passes are in bf16.
    """
    aside = directory.with_name(f"{directory.name}.partial")
    aside.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(sentences, shape.vocabulary, shape.max_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(tokenizer, shape)).to(device)
    blocks = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim != 2 or weight is model.lm_head.weight]
    optimizers = [
        torch.optim.Muon(blocks, lr=_MATRIX_LR, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=_LR, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            each, each.param_groups[0]["lr"], total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
        for each in optimizers
    ]
    rows = tokenizer(sentences, verbose=False)["input_ids"]  # or it would warn of long ones, which are cut here
    encoded = [[*ids[: shape.max_tokens - 1], tokenizer.eos_token_id] for ids in rows]

    parts = [model, *optimizers, *schedules]
    text = hashlib.blake2b("\n".join(sentences).encode()).hexdigest()
    settings = {"seed": seed, "shape": asdict(shape), "steps": steps, "batch_size": batch_size, "text": text}
    done = _resume(aside / "state.pt", parts, settings)
    model.train()
    for step, batch in enumerate(_batches(encoded, batch_size, steps, seed), 1):
        if step <= done:
            continue
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in batch], batch_first=True, padding_value=tokenizer.pad_token_id
        ).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            logits = model(input_ids=ids[:, :-1]).logits  # causal, padded on the right: no mask needed
        loss = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()
        if progress:
            progress(step, loss.item())
        if step % _STATE_EVERY == 0 and step < steps:
            _keep(aside / "state.pt", step, parts, settings)

    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(directory)
    for name in ("state.pt", "state.new"):
        (directory / name).unlink(missing_ok=True)


def _keep(path: Path, step: int, parts: list, settings: dict) -> None:
    new = path.with_suffix(".new")
    torch.save({"step": step, "settings": settings, "parts": [part.state_dict() for part in parts]}, new)
    new.rename(path)


def _resume(path: Path, parts: list, settings: dict) -> int:
    """Steps that an interrupted training had done, its state put into `parts`; 0 if there is none to go on with."""
    try:
        state = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError):  # none, or one that a power cut left torn
        return 0
    if state["settings"] != settings:
        return 0
    for part, values in zip(parts, state["parts"], strict=True):
        part.load_state_dict(values)
    return state["step"]


def train_tokenizer(sentences: list[str], vocabulary: int, max_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with BOS, EOS and PAD, which puts BOS in front of every text.

    It cuts at spaces only: the usual pattern would also cut Devanagari words at every vowel sign.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\S+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
    )


def _config(tokenizer: PreTrainedTokenizerFast, shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.max_tokens,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _batches(encoded: list[list[int]], batch_size: int, steps: int, seed: int) -> Iterator[list[list[int]]]:
    """`steps` batches of rows of similar length: 16 batches' worth of rows is drawn, sorted, cut and shuffled."""
    rng = random.Random(seed)
    waiting: list[list[list[int]]] = []
    for _ in range(steps):
        if not waiting:
            rows = sorted(rng.sample(encoded, min(len(encoded), 16 * batch_size)), key=len)
            waiting = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
            rng.shuffle(waiting)
        yield waiting.pop()
