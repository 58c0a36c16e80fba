"""Passes without padding: rows behind each other in one, told apart by their positions.

Flash attention keeps packed rows apart at no cost. Other attentions do so by a mask of tokens x tokens, and some
architectures not at all: they let a row see the ones before it, without a word. So each model is asked first.
"""

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from mlalign import distributed
from mlalign.collate import collate_bitext, collate_task, pad_id
from mlalign.config import Model
from mlalign.errors import UserError
from mlalign.evaluation import to_device
from mlalign.examples import Pair, TaskExample
from mlalign.model import precision_dtype, vocabulary
from mlalign.tracker import say

#: Largest relative difference between packed and padded rows that is rounding. Rows that see each other differ by 0.1.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def choose_pad(engine, settings: Model, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that pads batches, or None: rows are packed, if asked for or with flash attention. Called by all ranks.

    Raises UserError where packing is asked for and the model computes something else then.
    """
    lm = engine.module.lm.get_base_model() if isinstance(engine.module.lm, PeftModel) else engine.module.lm
    # A recurrent state may flow from row to row, by too little for the question below to tell it from rounding in bf16.
    wanted = engine.module.flash and not lm._is_stateful if settings.packing == "auto" else settings.packing
    pad = pad_id(tokenizer, vocabulary(lm))
    if not wanted:
        return pad
    dtype = precision_dtype(settings.precision)
    try:
        error = packing_error(engine, pad)
        wrong = f"packed rows differ from padded ones by {error:.1g}" if not error <= _ROUNDING[dtype] else ""
    except (TypeError, ValueError, NotImplementedError) as failure:  # a forward that does not know the arguments
        wrong = " ".join(str(failure).split())
    wrong = distributed.broadcast_object(wrong)
    if not wrong:
        return None
    found = f"{type(lm).__name__} cannot tell packed rows apart"
    if settings.packing is True:
        raise UserError(f"model.packing: {found}: {wrong}; set it to auto or false")
    say(f"rows are padded: {found}: {wrong}")
    return pad


def packing_error(engine, pad: int) -> float:
    """The largest relative difference between packed and padded rows: of task losses, and of embeddings, by L2.

    The second row repeats the first: a model that sees both predicts it better.
    """
    ids = [7919 * i % min(vocabulary(engine.module.lm), 1000) for i in range(1, 13)]
    rows = [TaskExample(row, row, len(row) - 1, "") for row in (ids, ids[:9])]
    pairs = [Pair(ids, ids[:7], ("", ""), (0, 0, 0)), Pair(ids[:5], ids[2:], ("", ""), (0, 0, 0))]
    engine.eval()
    found = []
    with torch.no_grad():
        for padding in (pad, None):
            nll = engine(task=to_device(collate_task(rows, padding), engine.device))
            passes = [to_device(inputs, engine.device) for inputs in collate_bitext(pairs, padding, [2 * len(pairs)])]
            found.append((nll, engine(bitext=passes)))
    engine.train()
    return max(((packed - padded).norm() / padded.norm()).item() for padded, packed in zip(*found))
