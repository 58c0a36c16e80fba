"""The model of the benchmarks: a random Llama of any shape, and a tokenizer whose tokens are bytes. Rows for it."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}


def save_byte_llama(folder: Path, **shape) -> str:
    """Save both into `folder`; `shape` is what LlamaConfig takes, the vocabulary by default the bytes and no more.

    Returns: the folder, as `model.path` wants it.
    """
    bytes_ = Tokenizer(models.BPE(vocab=WORDS, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=bytes_, **special).save_pretrained(folder)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    settings = {"vocab_size": len(WORDS), "max_position_embeddings": 1024} | ids | shape
    large = settings.get("hidden_size", 0) > 2048  # made and saved in fp32, 8B would take 32 GB of memory and of disk
    dtype = torch.bfloat16 if large else torch.float32
    LlamaForCausalLM._from_config(LlamaConfig(**settings), dtype=dtype).save_pretrained(folder)
    return str(folder)


def save_rows(folder: Path, tokens: int, side: int) -> None:
    """Save task.jsonl, 64 rows of so many tokens, and bitext.jsonl, 128 pairs of so many tokens a side."""
    rng = random.Random(0)

    def text(length: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(length))

    half = tokens // 2 - 1  # beside the tokens of beginning and end
    task = [{"prompt": text(half), "completion": text(half), "lang": "en"} for _ in range(64)]
    pairs = [{"src": text(side - 1), "tgt": text(side - 1), "src_lang": "de", "tgt_lang": "en"} for _ in range(128)]
    for name, rows in (("task", task), ("bitext", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
