"""Packed rows give what padded ones do, or are not packed: every architecture is asked."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_model import ARCHITECTURES, build

from mlalign import packing
from mlalign.collate import collate_bitext, collate_ids, collate_task, pad_id
from mlalign.config import Model
from mlalign.errors import UserError
from mlalign.examples import Pair, TaskExample
from mlalign.loss import IGNORED
from mlalign.model import AlignedModel, vocabulary

ROWS = [[5, 6, 7, 8], [9], [10, 11]]


class Bare:
    """As an engine calls a model, without one."""

    device = torch.device("cpu")

    def __init__(self, architecture: str, pooling: str = "mean") -> None:
        self.module = AlignedModel(build(architecture), 2, pooling)
        self.train, self.eval = self.module.train, self.module.eval

    def __call__(self, **passes):
        return self.module(**passes)


class NoEmbeddings(torch.nn.Module):
    def get_input_embeddings(self):
        return torch.nn.Module()


def test_packed_rows_lie_behind_each_other():
    inputs = collate_ids(ROWS, pad=None)
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1]]
    padded = torch.zeros(12, dtype=torch.int64).index_copy(0, inputs["slots"], inputs["input_ids"][0]).view(3, 4)
    assert torch.equal(padded, collate_ids(ROWS, pad=0)["input_ids"])
    assert torch.equal(inputs["attention_mask"], padded != 0)


def test_the_same_tokens_are_learned_packed_and_padded():
    labels = [[IGNORED, 6, IGNORED, 8], [9], [10, 11]]
    batch = [TaskExample(ids, learned, 0, "") for ids, learned in zip(ROWS, labels)]
    packed, padded = (collate_task(batch, pad) for pad in (None, 0))
    assert packed["targets"].tolist() == padded["targets"].tolist() == [6, 8, 11]
    for inputs in (packed, padded):  # each is predicted by the token before it
        assert inputs["input_ids"].flatten()[inputs["positions"]].tolist() == [5, 7, 10]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"falcon", "bloom"}))
def test_packed_rows_are_told_apart(architecture, pooling):
    assert packing.packing_error(Bare(architecture, pooling), pad=0) < 1e-5


def test_gradients_of_packed_rows_are_those_of_padded_ones():
    pairs = [Pair(row, [*row, 3], ("", ""), (0, 0, 0)) for row in ROWS]
    batch = [TaskExample([3, *row], [IGNORED, *row], len(row), "") for row in ROWS]
    model, found = Bare("llama").module, []
    for pad in (None, 0):
        model.zero_grad()
        embeddings = model(bitext=collate_bitext(pairs, pad, [6]))
        (model(task=collate_task(batch, pad)) + embeddings.square().sum()).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_a_model_that_cannot_tell_packed_rows_apart_is_refused_or_padded(tokenizer, capsys):
    engine = Bare("falcon")
    assert packing.packing_error(engine, pad=0) > 1e-2
    with pytest.raises(UserError, match=r"model\.packing: FalconForCausalLM cannot tell packed rows apart"):
        packing.choose_pad(engine, Model(path="", packing=True), tokenizer)
    engine.module.flash = True
    assert packing.choose_pad(engine, Model(path=""), tokenizer) == tokenizer.pad_token_id
    assert "rows are padded: FalconForCausalLM" in capsys.readouterr().out


def test_a_model_with_a_recurrent_state_is_padded_unasked(tokenizer, monkeypatch):
    engine = Bare("llama")
    engine.module.flash = True
    assert packing.choose_pad(engine, Model(path=""), tokenizer) is None
    monkeypatch.setattr(type(engine.module.lm), "_is_stateful", True)
    monkeypatch.setattr(packing, "packing_error", None)
    assert packing.choose_pad(engine, Model(path=""), tokenizer) == tokenizer.pad_token_id


def test_adapters_of_the_embeddings_hide_their_number():
    lm = build("llama")
    adapted = get_peft_model(lm, LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    assert vocabulary(adapted) == 97
    assert vocabulary(torch.nn.Module.__new__(NoEmbeddings)) == math.inf


def test_a_padding_token_that_the_model_has_no_embedding_for_is_another(tokenizer):
    assert pad_id(tokenizer, tokenizer.pad_token_id + 1) == tokenizer.pad_token_id
    assert pad_id(tokenizer, tokenizer.pad_token_id) == 0


def test_a_model_without_positions_is_refused_too(tokenizer):
    with pytest.raises(UserError, match="BloomForCausalLM cannot tell packed rows apart"):
        packing.choose_pad(Bare("bloom"), Model(path="", packing=True), tokenizer)


def test_rows_are_packed_with_flash_attention_or_where_asked(tokenizer):
    engine, pad = Bare("llama"), tokenizer.pad_token_id
    assert packing.choose_pad(engine, Model(path=""), tokenizer) == pad
    assert packing.choose_pad(engine, Model(path="", packing=True), tokenizer) is None
    engine.module.flash = True  # sdpa takes no notice of the edges that flash attention is given
    assert packing.choose_pad(engine, Model(path=""), tokenizer) is None
    assert packing.choose_pad(engine, Model(path="", packing=False), tokenizer) == pad
