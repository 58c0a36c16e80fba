"""Generating answers: prompts in, texts out, behind one seam for every backend.

`open_backend(settings)` loads the model once and returns a function from prompts to answers. `hf` is transformers'
`generate` on any number of ranks, which share the batches; `vllm` is vLLM, in one process, where it is installed.
Batches are the same on any number of ranks, so the answers are too.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mlalign import distributed
from mlalign.collate import collate_ids, pad_id
from mlalign.config import Model
from mlalign.errors import UserError
from mlalign.model import load_for_inference, vocabulary, without_adapter

Prompts = list[list[int]]
Generate = Callable[[Prompts, Callable[[], None]], list[str]]
"""Prompts, and what is called by all ranks between batches and may raise to stop -> answers."""

_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)  # what reasoning models write before the answer


@dataclass(frozen=True)
class Decoding:
    """What to generate with, and how."""

    model: str
    adapter: str | None
    backend: str = "hf"
    precision: str = "auto"
    beams: int = 1  #: 1 = greedy
    batch_size: int = 32  #: prompts of one batch on one rank
    max_new_tokens: int = 128
    trust_remote_code: bool = False

    @property
    def source(self) -> Model:
        """What is to be loaded."""
        return Model(path=self.model, precision=self.precision, trust_remote_code=self.trust_remote_code)


def open_backend(decoding: Decoding, tokenizer: PreTrainedTokenizerBase) -> Generate:
    """Load the model. The function that is returned must be called by all ranks, and answers on all."""
    if decoding.backend not in _BACKENDS:
        raise UserError(f"backend {decoding.backend} is not one of {', '.join(_BACKENDS)}")
    return _BACKENDS[decoding.backend](decoding, tokenizer)


def end_ids(tokenizer: PreTrainedTokenizerBase, configured: int | list[int] | None) -> list[int]:
    """Tokens that end an answer: EOS, what the model's generation config names, and the chat template's end of turn."""
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = tokenizer.encode(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        visible = [i for i in ids if tokenizer.decode([i]).strip()]
        ends |= {visible[-1]} & special
    return sorted(ends - {None})


def _answer(tokens: list[int], ends: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return _THOUGHT.sub("", tokenizer.decode(tokens[:end], skip_special_tokens=True)).strip()


# ---------------------------------------------------------------------------------------------------- transformers


def _open_hf(decoding: Decoding, tokenizer: PreTrainedTokenizerBase) -> Generate:
    lm = load_for_inference(decoding.source, decoding.adapter)
    base = without_adapter(lm)
    ends = end_ids(tokenizer, base.generation_config.eos_token_id)
    pad = pad_id(tokenizer, vocabulary(base))
    # In place of the model's own, which may hold more than it says, such as a repetition penalty of 1.05 in Qwen2.5.
    lm.generation_config = base.generation_config = GenerationConfig(
        num_beams=decoding.beams,
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=pad,
    )

    @torch.inference_mode()
    def generate(prompts: Prompts, check: Callable[[], None]) -> list[str]:
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # a batch too large fails at once
        batches = [order[start : start + decoding.batch_size] for start in range(0, len(order), decoding.batch_size)]
        answers: dict[int, str] = {}
        for first in range(0, len(batches), distributed.world_size()):
            check()
            own = first + distributed.rank()
            if own >= len(batches):  # the last round has fewer batches than ranks
                continue
            inputs = _left_padded([prompts[i] for i in batches[own]], pad, distributed.device())
            tokens = lm.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            answers |= {i: _answer(row, ends, tokenizer) for i, row in zip(batches[own], tokens.tolist())}
        everything = {i: answer for part in distributed.gather_objects(answers) for i, answer in part.items()}
        return [everything[i] for i in range(len(prompts))]

    return generate


def _left_padded(prompts: Prompts, pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Generation continues the last position of every row, so the padding stands on the left."""
    flipped = collate_ids([prompt[::-1] for prompt in prompts], pad)
    return {name: tensor.flip(1).to(device) for name, tensor in flipped.items()}


# ------------------------------------------------------------------------------------------------------------ vLLM


def _open_vllm(decoding: Decoding, tokenizer: PreTrainedTokenizerBase) -> Generate:
    if distributed.world_size() > 1:
        raise UserError("backend vllm spreads over the GPUs by itself: start it without a launcher")
    if decoding.beams > 1:
        raise UserError(f"beams is {decoding.beams}, but backend vllm decodes greedily: use --backend hf")
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise UserError("backend vllm needs vLLM, which is not installed: pip install vllm, or --backend hf") from error
    llm = LLM(
        decoding.model,
        dtype={"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}[decoding.precision],
        tensor_parallel_size=max(torch.cuda.device_count(), 1),
        enable_lora=decoding.adapter is not None,
        max_lora_rank=512 if decoding.adapter else 16,
        trust_remote_code=decoding.trust_remote_code,
    )
    ends = end_ids(tokenizer, None)
    how = SamplingParams(temperature=0.0, max_tokens=decoding.max_new_tokens, stop_token_ids=ends)
    lora = LoRARequest("adapter", 1, decoding.adapter) if decoding.adapter else None

    def generate(prompts: Prompts, check: Callable[[], None]) -> list[str]:
        check()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], how, lora_request=lora)
        return [_answer(list(each.outputs[0].token_ids), ends, tokenizer) for each in outputs]

    return generate


_BACKENDS = {"hf": _open_hf, "vllm": _open_vllm}
