"""Passes without padding: rows behind each other in one, told apart by their positions.

Flash attention keeps packed rows apart at no cost: that of flash-attn, or that of torch, see `varlen`. Other attentions
do so by a mask of tokens x tokens, and some architectures not at all: they silently let a row see the ones before it.
So each model is asked first.
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlalign import distributed, varlen
from mlalign.collate import collate_bitext, collate_task, pad_id
from mlalign.config import Model
from mlalign.errors import UserError, one_line
from mlalign.evaluation import to_device
from mlalign.examples import Pair, TaskExample
from mlalign.model import vocabulary, without_adapter
from mlalign.objectives import random_state, set_random_state
from mlalign.tracker import say


def choose_pad(engine, settings: Model, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that pads batches, or None: rows are packed, if asked for or with flash attention. Called by all ranks.

    Raises UserError where packing is asked for and the model computes something else then.
    """
    lm = without_adapter(engine.module.lm)
    pad, loaded, wrong = pad_id(tokenizer, vocabulary(lm)), lm.config._attn_implementation, ""
    for attention in _attentions(engine, lm, settings):
        wrong = _wrong_kernel(engine, lm) if attention == varlen.NAME else ""
        wrong = wrong or _wrong_rows(engine, lm, pad, attention)
        if not wrong:
            return None
        engine.module.attend_by(loaded)
    if wrong and settings.packing is True:
        raise UserError(f"model.packing: {wrong}; set it to auto or false")
    if wrong:
        say(f"rows are padded: {wrong}")
    return pad


def _attentions(engine, lm: PreTrainedModel, settings: Model) -> list[str]:
    """What may keep packed rows apart, the best first; nothing where rows are to be padded."""
    if settings.packing is False:
        return []
    loaded = lm.config._attn_implementation
    torchs = [varlen.NAME] if distributed.broadcast_object(varlen.serves(lm, settings)) else []
    if settings.packing is True:
        return [*torchs, loaded]
    # A recurrent state may flow from row to row, by too little for packing_error to tell it from rounding in bf16.
    return [] if lm._is_stateful else [loaded] if engine.module.flash else torchs


def _wrong_kernel(engine, lm: PreTrainedModel) -> str:
    wrong = distributed.broadcast_object(varlen.wrong_kernel(lm.config, lm.dtype, engine.device))
    return wrong and f"torch's flash attention does not serve here: {wrong}"


def _wrong_rows(engine, lm: PreTrainedModel, pad: int, attention: str) -> str:
    refusal = RuntimeError if attention == varlen.NAME else NotImplementedError  # a kernel's, or a forward's
    try:
        error = packing_error(engine, pad, attention)
        wrong = "" if error <= varlen.ROUNDING[lm.dtype] else f"packed rows differ from padded ones by {error:.1g}"
    except (TypeError, ValueError, refusal) as failure:
        if distributed.lost_a_rank(failure):
            raise
        wrong = one_line(failure)
    return distributed.broadcast_object(wrong and f"{type(lm).__name__} cannot tell packed rows apart: {wrong}")


def packing_error(engine, pad: int, attention: str) -> float:
    """The largest relative difference between packed and padded rows: of task losses, and of embeddings, by L2.

    The second row repeats the first: a model that sees both predicts it better. Args: attention: of packed rows, and of
    the model from then on; padded ones are attended to as it was loaded.
    """
    ids = [7919 * i % min(vocabulary(engine.module.lm), 1000) for i in range(1, 13)]
    rows = [TaskExample(row, row, len(row) - 1, "") for row in (ids, ids[:9])]
    pairs = [Pair(ids, ids[:7], ("", ""), (0, 0, 0)), Pair(ids[:5], ids[2:], ("", ""), (0, 0, 0))]
    engine.eval()
    found = []
    with torch.no_grad():
        for padding in (pad, None):
            if padding is None:
                engine.module.attend_by(attention)
            nll = engine(task=to_device(collate_task(rows, padding), engine.device))
            passes = [to_device(inputs, engine.device) for inputs in collate_bitext(pairs, padding, [2 * len(pairs)])]
            found.append((nll, engine(bitext=passes)))
        engine.train()
        state = random_state()
        engine(task=to_device(collate_task(rows, None), engine.device))  # raises where dropout is out of the question
        set_random_state(state)
    return max(((packed - padded).norm() / padded.norm()).item() for padded, packed in zip(*found))
