"""The base model of `mlalign demo`: a small language model that has read seven languages and no label.

It stands in for the pretrained LLM of a real run. Nothing in its training tells it which sentences are translations of
each other, and it knows the words of the answers only from lists in random order, never beside an utterance.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2400
HIDDEN, INTERMEDIATE, LAYERS, HEADS = 128, 352, 6, 4
MAX_TOKENS = 128

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_base(
    sentences: list[str],
    directory: str | Path,
    seed: int,
    *,
    steps: int = 600,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    vocabulary: int = VOCABULARY,
    max_tokens: int = MAX_TOKENS,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Train tokenizer and model on `sentences` and save both into `directory`, as any Hugging Face model.

    batch_size is in sentences. The learning rate rises over the first tenth of the steps and then falls along a cosine.
    `progress(step, loss)` is called after every step, loss in nats per token. Equal arguments and an equal number of
    threads give an equal model.
    """
    tokenizer = train_tokenizer(sentences, vocabulary, max_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(tokenizer, max_tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(sentences)["input_ids"]]

    model.train()
    for step, batch in enumerate(_batches(encoded, batch_size, steps, seed), 1):
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in batch], batch_first=True, padding_value=tokenizer.pad_token_id
        )
        logits = model(input_ids=ids[:, :-1]).logits  # causal, padded on the right: no mask needed
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if progress:
            progress(step, loss.item())

    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_tokenizer(
    sentences: list[str], vocabulary: int = VOCABULARY, max_tokens: int = MAX_TOKENS
) -> PreTrainedTokenizerFast:
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


def _config(tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=max_tokens,
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
