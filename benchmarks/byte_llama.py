"""The model of the benchmarks: a random Llama of any shape, and a tokenizer whose tokens are bytes."""

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
