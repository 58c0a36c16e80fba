"""Packed rows give what padded ones do, or are not packed: every architecture is asked."""

import math
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_model import ARCHITECTURES, build

from mlalign import distributed, packing, varlen
from mlalign.collate import collate_bitext, collate_ids, collate_task, pad_id, pair_keys
from mlalign.config import Alignment, Lora, Model
from mlalign.errors import UserError
from mlalign.evaluation import to_device
from mlalign.examples import Pair, TaskExample
from mlalign.loss import IGNORED
from mlalign.model import AlignedModel, add_lora, vocabulary
from mlalign.objectives import BitextChunk, align_backward, task_backward

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
    engine = Bare(architecture, pooling)
    assert packing.packing_error(engine, 0, engine.module.lm.config._attn_implementation) < 1e-5


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
    assert packing.packing_error(engine, 0, "sdpa") > 1e-2
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


# ------------------------------------------------------------------------------------- torch's flash attention, varlen


def kernel(query, key, value, rows, rows_of_keys, longest, longest_keys, *, scale, window_size, enable_gqa):
    """`varlen_attn` as torch documents it, which runs on GPUs only: token by token."""
    assert rows is rows_of_keys and longest == longest_keys == rows.diff().max()
    assert enable_gqa == (query.shape[1] != key.shape[1])
    back, ahead = window_size
    assert ahead == 0
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    outputs = []
    for begin, end in zip(rows.tolist(), rows.tolist()[1:]):
        for i in range(begin, end):
            seen = slice(begin if back < 0 else max(begin, i - back), i + 1)
            scores = torch.einsum("hd,shd->hs", query[i], key[seen]) * (scale or query.shape[-1] ** -0.5)
            outputs.append(torch.einsum("hs,shd->hd", scores.softmax(-1), value[seen]))
    return torch.stack(outputs)


@pytest.fixture
def torchs_kernel(monkeypatch):
    """As on a GPU: torch's kernel serves every model that has sdpa."""
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(
        varlen, "serves", lambda lm, _: lm._supports_flash_attn and lm.config._attn_implementation == "sdpa"
    )


BY_KERNEL = sorted(set(ARCHITECTURES) - {"falcon", "bloom", "gemma2"})


@pytest.mark.parametrize("architecture", BY_KERNEL)
def test_torchs_kernel_gives_packed_rows_what_sdpa_gives_padded_ones(
    architecture, torchs_kernel, tokenizer, monkeypatch
):
    """Some of these have a sliding window, grouped heads, or heads of a width of their own."""
    monkeypatch.setattr("mlalign.varlen.ROUNDING", {torch.float32: 1e-5})
    engine = Bare(architecture)
    assert packing.choose_pad(engine, Model(path=""), tokenizer) is None
    assert engine.module.lm.config._attn_implementation == "varlen"
    assert engine.module.flash


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ["mistral", "qwen3"])
def test_gradients_by_torchs_kernel_are_those_of_padded_rows(architecture, adapters, torchs_kernel, tokenizer):
    pairs = [Pair(row, [*row, 3], ("", ""), (0, 0, 0)) for row in ROWS]
    batch = [TaskExample([3, *row], [IGNORED, *row], len(row), "") for row in ROWS]
    engine, found = Bare(architecture), []
    if adapters:
        engine.module = AlignedModel(add_lora(build(architecture), Lora(dropout=0.0)), 2, "mean")
    for packed in (False, True):
        pad = packing.choose_pad(engine, Model(path=""), tokenizer) if packed else 0
        assert (pad is None) == packed
        engine.module.zero_grad()
        embeddings = engine.module(bitext=collate_bitext(pairs, pad, [6]))
        (engine.module(task=collate_task(batch, pad)) + embeddings.square().sum()).backward()
        found.append(torch.cat([p.grad.flatten() for p in engine.module.parameters() if p.requires_grad]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_torchs_kernel_is_compared_with_sdpa_first(torchs_kernel):
    assert varlen.kernel_error(build("qwen3").config, torch.float32, torch.device("cpu")) < 1e-6


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda *given, **named: 1.01 * kernel(*given, **named), "it differs from sdpa by 0.01"),
        (lambda *given, window_size, **named: kernel(*given, window_size=(-1, 0), **named), "it differs from sdpa by"),
        (lambda *_, **__: torch.zeros(()).view(2), "shape '[2]' is invalid for input of size 1"),
        (mock.Mock(side_effect=RuntimeError), "RuntimeError"),
    ],
    ids=["of another scale", "without a window", "that does not run", "that says nothing"],
)
def test_a_wrong_kernel_is_not_used(wrong, said, torchs_kernel, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(varlen, "varlen_attn", wrong)
    engine = Bare("llama")
    assert packing.choose_pad(engine, Model(path=""), tokenizer) == tokenizer.pad_token_id
    assert f"rows are padded: torch's flash attention does not serve here: {said}" in " ".join(
        capsys.readouterr().out.split()
    )
    assert engine.module.lm.config._attn_implementation == "sdpa"
    assert not engine.module.flash
    assert packing.choose_pad(engine, Model(path="", packing=True), tokenizer) is None, "by sdpa, as was asked for"
    assert engine.module.lm.config._attn_implementation == "sdpa"


def test_attention_with_dropout_is_not_done_by_torchs_kernel(torchs_kernel, tokenizer, capsys):
    engine = Bare("gpt2")
    for block in engine.module.lm.transformer.h:
        block.attn.attn_dropout.p = 0.1
    drawn = torch.get_rng_state()
    assert packing.choose_pad(engine, Model(path=""), tokenizer) == tokenizer.pad_token_id
    assert "GPT2LMHeadModel cannot tell packed rows apart: its attention has dropout" in " ".join(
        capsys.readouterr().out.split()
    )
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"is_causal": False}, "looks ahead"),
        ({"cu_seq_lens_q": None}, "not told of the rows' edges"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "not told of the rows' edges"),
        ({"softcap": 30.0}, "has softcap"),
        ({"s_aux": torch.zeros(4)}, "has s_aux"),
        ({"value": torch.zeros(1, 2, 3, 4)}, "has values of another width"),
    ],
)
def test_what_torchs_kernel_cannot_do_is_refused(given, reason, torchs_kernel):
    states = {name: torch.zeros(1, heads, 3, 8) for name, heads in (("query", 4), ("key", 2), ("value", 2))}
    rows = {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 3]), "max_length_q": 3}
    with pytest.raises(NotImplementedError, match=reason):
        varlen.attend(torch.nn.Module(), **states | rows | given)


def test_torch_knows_its_kernel_as_it_is_called():
    """On shapes, for it runs on GPUs only."""
    states = [torch.empty(1, heads, 5, 8, device="meta", requires_grad=True) for heads in (4, 2, 2)]
    rows = {"cu_seq_lens_q": torch.empty(3, dtype=torch.int32, device="meta"), "max_length_q": 4}
    for window in (None, 3):
        output, _ = varlen.attend(torch.nn.Module(), *states, None, sliding_window=window, **rows)
        assert output.shape == (1, 5, 4, 8)
        gradients = torch.autograd.grad(output, states, torch.empty_like(output))
        assert [each.shape for each in gradients] == [each.shape for each in states]


def passes_without_values(architecture: str, adapters: bool, attention: str) -> None:
    """Both objectives' passes in bf16, forward and backward, on tensors of the meta device, which nothing can read."""
    engine = Bare(architecture)
    if adapters:
        engine.module = AlignedModel(add_lora(build(architecture), Lora(dropout=0.1)), 2, "mean")
    engine.module.ask()
    engine.module.attend_by(attention)
    engine.module.bfloat16().to("meta")
    engine.device = torch.device("meta")
    engine.backward = lambda loss, scale_wrt_gas: loss.backward()
    pairs = [Pair(row, [*row, 3], ("", ""), (0, 0, 0)) for row in ROWS]
    batch = [TaskExample([3, *row], [IGNORED, *row], len(row), "") for row in ROWS]
    task = to_device(collate_task(batch, None), engine.device)
    passes = [to_device(inputs, engine.device) for inputs in collate_bitext(pairs, None, [6])]
    chunk = BitextChunk(passes, pair_keys(pairs).to(engine.device))
    settings = Alignment(train="", batch_size=3, micro_batch_size=3)
    loss = task_backward(engine, [task, task], 10, 1.0)
    for chunks in ([chunk], [chunk, chunk]):
        loss = loss + align_backward(engine, chunks, settings, 0.5)
    assert loss.shape == ()
    assert all(parameter.grad is not None for parameter in engine.module.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", sorted(set(BY_KERNEL) - {"gpt2"}))  # GPT-2 looks for padding in every pass
def test_passes_by_torchs_kernel_never_wait_for_the_gpu(architecture, adapters):
    """Nor do they mix devices or types: on a tensor without values, whatever waits for one raises."""
    passes_without_values(architecture, adapters, varlen.NAME)


def test_a_pass_that_waits_would_be_noticed():
    """transformers looks through the positions of packed rows for the mask that sdpa needs."""
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
        passes_without_values("llama", False, "sdpa")


def test_torchs_kernel_serves_where_flash_attention_would(monkeypatch):
    monkeypatch.setattr(distributed, "uses_cuda", lambda: True)
    lm = build("llama").bfloat16()
    assert varlen.serves(lm, Model(path=""))
    assert not varlen.serves(lm, Model(path="", attention="sdpa")), "asked for by name"
    assert not varlen.serves(build("llama"), Model(path="")), "fp32, which flash attention does not know"
    assert not varlen.serves(build("gemma2").bfloat16(), Model(path="")), "eager: capped scores"
    monkeypatch.setattr(distributed, "uses_cuda", lambda: False)
    assert not varlen.serves(lm, Model(path=""))
