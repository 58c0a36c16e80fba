"""Attention over packed rows by torch's own flash kernel: no padding on GPUs where flash-attn is not installed.

    serves(lm, settings)        whether to try it: on GPUs, in bf16, where sdpa was taken for want of flash attention
    wrong_kernel(settings, ...) why the kernel must not do it; asked of the kernel, gradients included
    lm.set_attn_implementation(NAME)    from now on transformers calls `attend` in every block

Used by `packing`, which asks the model itself as well. Transformers makes no mask for an attention that it knows none
for, and so does not look for rows in `position_ids`, which would wait for the GPU in every pass.
"""

from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from mlalign import distributed
from mlalign.config import Model
from mlalign.errors import one_line

NAME = "varlen"

#: Largest relative difference that is rounding. Rows that see each other differ by 0.1.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

#: What attention may be asked for, and the kernel has not.
_UNKNOWN = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")
_LENGTHS = (40, 3, 21)  #: of the rows that it is tried on
_WINDOW = 16


def serves(lm: PreTrainedModel, settings: Model) -> bool:
    """Whether a model's attention may be done by the kernel, as far as its class says."""
    return (
        settings.attention == "auto"
        and distributed.uses_cuda()
        and lm.dtype == torch.bfloat16
        and lm.config._attn_implementation == "sdpa"
        and lm._supports_flash_attn  # then its blocks say how far back they look, which for sdpa is in the mask
        and lm._can_set_attn_implementation()
    )


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of packed rows, as transformers calls it.

    Args: query [1, heads, tokens, width], key and value of as many heads or fewer; cu_seq_lens_q [rows + 1]: where the
    rows begin and end; sliding_window: tokens that one sees, itself included.
    Returns: [1, tokens, heads, width], and no weights. Raises NotImplementedError for what the kernel cannot do.
    """
    causal = other.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise NotImplementedError("its attention looks ahead")
    if cu_seq_lens_q is None or attention_mask is not None:
        raise NotImplementedError("its blocks are not told of the rows' edges")
    strange = [name for name in _UNKNOWN if other.get(name) is not None] + ["dropout"] * bool(dropout)
    if strange or value.shape[-1] != query.shape[-1]:
        raise NotImplementedError(f"its attention has {strange[0] if strange else 'values of another width'}")
    packed = varlen_attn(
        *(states[0].transpose(0, 1) for states in (query, key, value)),
        *(cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q),
        scale=scaling,
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return packed[None], None


AttentionInterface.register(NAME, attend)


def wrong_kernel(settings: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> str:
    """Why the kernel must not be used for such a model on this device; empty where nothing speaks against it."""
    try:
        error = kernel_error(settings, dtype, device)
    except RuntimeError as failure:  # whose first sentence says it: advice and a stack of C++ follow
        return one_line(failure).partition(". ")[0] or type(failure).__name__
    return "" if error <= ROUNDING[dtype] else f"it differs from sdpa by {error:.1g}"


def kernel_error(settings: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative difference, by L2, between the kernel and sdpa in fp32: of the output and of the gradients.

    At the number and width of the model's heads, with and without a sliding window.
    Raises RuntimeError where the kernel does not run.
    """
    settings = settings.get_text_config()
    heads = settings.num_attention_heads
    shared = getattr(settings, "num_key_value_heads", None) or heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    edges = [0, *accumulate(_LENGTHS)]
    drawn = torch.Generator().manual_seed(0)
    states = [torch.randn(1, count, edges[-1], width, generator=drawn) for count in (heads, shared, shared, heads)]
    states = [each.to(device, dtype) for each in states]
    lengths = {"cu_seq_lens_q": torch.tensor(edges, dtype=torch.int32, device=device), "max_length_q": max(_LENGTHS)}
    errors = []
    for window in (None, _WINDOW):
        *inputs, output_gradient = [each.clone().requires_grad_() for each in states]
        output, _ = attend(nn.Module(), *inputs, None, sliding_window=window, **lengths)
        found = [output, *torch.autograd.grad(output, inputs, output_gradient.transpose(1, 2))]
        *inputs, output_gradient = [each.float().clone().requires_grad_() for each in states]
        output = torch.cat([_sdpa(*inputs, slice(*row), window) for row in pairwise(edges)], dim=2).transpose(1, 2)
        expected = [output, *torch.autograd.grad(output, inputs, output_gradient.transpose(1, 2))]
        errors += [(one.float() - other).norm() / other.norm() for one, other in zip(found, expected)]
    return torch.stack(errors).max().item()


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: slice, window: int | None) -> torch.Tensor:
    """Of one row, with a mask for what a token sees: [1, heads, length, width]."""
    length = row.stop - row.start
    back = torch.arange(length)[:, None] - torch.arange(length)
    seen = (back >= 0) & (back < (window or length))
    states = (each[:, :, row] for each in (query, key, value))
    return F.scaled_dot_product_attention(*states, attn_mask=seen.to(query.device), enable_gqa=True)
