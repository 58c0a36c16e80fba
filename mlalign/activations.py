"""What forward and backward passes take, found out by running them on shapes: no weights, no rows, no GPU.

    paper = on_paper(config, layer, dtype, cuda)       the model, its adapters and its truncated view, without bytes
    task_pass(paper, ...), alignment_pass(paper, ...)  forward and backward, and what is alive at their peak

A formula such as that of Korthikanti et al. 2022 (section 4) covers one architecture and one attention. Here the code
of transformers runs on torch's fake tensors, and every tensor that it makes is counted while it lives: right for any
model, adapter, attention and checkpointing, in seconds for 8B parameters. Used by `mlalign plan`.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mlalign import model
from mlalign.config import Alignment, Config
from mlalign.errors import UserError
from mlalign.head import fuse_head
from mlalign.memory import Pass
from mlalign.objectives import FEW_CHUNKS, contrast
from mlalign.workload import Shapes


@dataclass(frozen=True)
class PaperModel:
    """A model whose tensors have shapes and no bytes."""

    aligned: model.AlignedModel
    fake: FakeTensorMode
    path: str

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter once, however many modules share it."""
        return list(self.aligned.parameters())

    @property
    def vocabulary(self) -> int:
        return self.aligned.lm.get_output_embeddings().weight.shape[0]

    @property
    def hidden(self) -> int:
        return self.aligned.lm.get_input_embeddings().weight.shape[1]


def on_paper(config: Config, layer: int, dtype: torch.dtype, cuda: bool = False) -> PaperModel:
    """The model that `train` would build, with adapters and truncated view. Raises UserError as `train` does.

    sdpa stands in for flash attention, which need not be installed here: both keep queries, keys, values and the output
    for backward, and no matrix of tokens x tokens. Args: cuda: whether it is to run on GPUs.
    """
    settings = model.load_model_config(config.model)
    attention = None if config.model.attention.startswith(("auto", "flash")) else config.model.attention
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(
                settings,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=config.model.trust_remote_code,
            )
    except (ImportError, ValueError) as error:
        raise UserError(f"model.path {config.model.path}: no model could be built: {error}") from error
    if lm.config._attn_implementation == "sdpa" and not (cuda and dtype == torch.float32):  # see `AlignedModel.ask`
        AttentionInterface.register("sdpa_on_paper", sdpa_attention_forward)
        AttentionMaskInterface.register("sdpa_on_paper", _mask_on_paper)
        lm.set_attn_implementation("sdpa_on_paper")
    if config.model.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.device("meta"):
        whole = model.add_lora(lm, config.lora) if config.lora else lm
    aligned = model.AlignedModel(whole, layer, config.alignment.pooling if config.alignment else "mean").train()
    aligned.fused = fuse_head(whole)  # whether the model's logits are plain is not known here, and assumed
    fake = FakeTensorMode()
    with fake:
        _fake_parameters(aligned)
    return PaperModel(aligned, fake, config.model.path)


def _mask_on_paper(
    kv_length: int, allow_is_causal_skip: bool = True, local_size: int | None = None, **given: Any
) -> torch.Tensor | None:
    """sdpa's mask if padding needs none: transformers would look into a mask for padding, and fakes hold nothing."""
    if allow_is_causal_skip and (local_size is None or kv_length < local_size):
        return None
    given |= {"kv_length": kv_length, "local_size": local_size, "attention_mask": None}
    return sdpa_mask(allow_is_causal_skip=False, **given)


def _fake_parameters(module: nn.Module) -> None:
    """Replace meta tensors, on which sdpa would fall back to its mathematical form, by fake CPU tensors."""
    made: dict[int, torch.Tensor] = {}
    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    if id(tensor) not in made:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        is_parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    tensors[name] = made[id(tensor)]


class _Live(TorchDispatchMode):
    """Adds up the tensors that are alive, storage by storage, after every operation; those `given` do not count."""

    def __init__(self, given: list[torch.Tensor], vocabulary: int) -> None:
        super().__init__()
        self._given = given  # kept, so that no other storage gets one of their addresses
        self._known = {tensor.untyped_storage()._cdata for tensor in given}
        self._matrices = {tensor.numel() for tensor in given}  # a gradient of the LM head is not logits
        self._vocabulary = vocabulary
        self.now = self.logits = self.gradients = 0  #: alive; of them logits; gradients made so far
        self.peak = self.logits_at_peak = self.peak_with_gradients = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, result)
        if self.now > self.peak:
            self.peak, self.logits_at_peak = self.now, self.logits
        self.peak_with_gradients = max(self.peak_with_gradients, self.now + self.gradients)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size = storage.nbytes()
        is_logits = tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary and tensor.numel() not in self._matrices
        logits = size if is_logits else 0
        self._known.add(storage._cdata)
        weakref.finalize(storage, self._remove, storage._cdata, size, logits)
        self.now += size
        self.logits += logits

    def _remove(self, address: int, size: int, logits: int) -> None:
        self._known.discard(address)
        self.now -= size
        self.logits -= logits

    def take_gradient(self, parameter: nn.Parameter) -> None:
        """A gradient is made: hand it over to what collects gradients."""
        self.gradients += parameter.grad.nbytes
        parameter.grad = None


def _run(paper: PaperModel, forward: Callable[[], torch.Tensor], zero3: bool) -> Pass:
    """Forward and backward of `forward`, whose tensors must be made within it."""
    with paper.fake, _linear_of_zero3(zero3):
        live = _Live([*paper.parameters(), *paper.aligned.buffers()], paper.vocabulary)
        trained = [p for p in paper.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(live.take_gradient) for p in trained]
        try:
            with live:
                loss = forward()
                saved = live.now
                loss.backward()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UserError(
                f"model.path {paper.path}: its passes depend on values and cannot be planned on shapes: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
    return Pass(saved, live.peak, live.logits_at_peak, live.peak_with_gradients)


@contextmanager
def _linear_of_zero3(zero3: bool) -> Iterator[None]:
    """Under ZeRO-3 DeepSpeed replaces `linear` by one that keeps its input even if the weight is frozen."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    usual = F.linear
    F.linear = zero3_linear_wrap if zero3 else usual
    try:
        yield
    finally:
        F.linear = usual


def task_pass(paper: PaperModel, shapes: Shapes, learned: int, zero3: bool = False) -> Pass:
    """A task micro-batch of one shape, rows x positions, of which `learned` are predicted."""
    ((rows, tokens),) = shapes

    def forward() -> torch.Tensor:
        chosen = {name: torch.zeros(learned, dtype=torch.int64) for name in ("positions", "targets")}
        return paper.aligned(task=_inputs(rows, tokens) | chosen)

    return _run(paper, forward, zero3)


def alignment_pass(
    paper: PaperModel, shapes: Shapes, settings: Alignment, ranks: int, chunks: int, zero3: bool = False
) -> Pass:
    """An alignment micro-batch of one or more passes, and InfoNCE over what `settings` contrasts.

    Args: chunks: micro-batches of one alignment batch on one rank. If there are several and negatives are global,
    the loss is not part of the pass, but all embeddings and their gradients are held during it; if there are few, the
    last pass is held while the loss is taken (`_align_in_chunks`).
    """
    pairs = sum(rows for rows, _ in shapes) // 2
    chunked = settings.negatives == "global" and chunks > 1
    copies = ranks if settings.negatives == "global" else 1

    def encode() -> torch.Tensor:
        embeddings = paper.aligned(bitext=[_inputs(rows, tokens) for rows, tokens in shapes])
        return (embeddings * embeddings.detach()).sum() if chunked else _contrast(embeddings, copies, settings)

    one = _run(paper, encode, zero3)
    if not chunked:
        return one
    held = 2 * 2 * pairs * chunks * paper.hidden * 4  # both sides, embeddings and gradients, fp32

    def lose() -> torch.Tensor:
        return _contrast(torch.zeros(2, pairs * chunks, paper.hidden, requires_grad=True), copies, settings)

    loss = _run(paper, lose, zero3)
    beside = one.saved if chunks <= FEW_CHUNKS else 0
    return Pass(one.saved + held, max(one.peak + held, beside + loss.peak), one.logits, one.peak_with_gradients + held)


def _inputs(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "rows": torch.zeros(rows, dtype=torch.int64)}


def _contrast(embeddings: torch.Tensor, copies: int, settings: Alignment) -> torch.Tensor:
    """`objectives.alignment_loss`, with copies of this rank's rows in place of the gather."""
    keys = torch.zeros(embeddings.shape[1], 3, dtype=torch.int64)
    rows = F.normalize(embeddings.float(), dim=-1)
    columns = rows.repeat(1, copies, 1)
    return contrast(rows, columns, keys, keys.repeat(copies, 1), 0, settings)
