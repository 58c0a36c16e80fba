"""The loss out of the LM head: against float64 and against the model's own logits, on every architecture."""

import pytest
import torch
import torch.nn.functional as F
from test_model import _LLAMA_LIKE, ARCHITECTURES, build
from torch.utils._python_dispatch import TorchDispatchMode

from mlalign import loss, model
from mlalign.collate import collate_task
from mlalign.config import Lora
from mlalign.data import TaskExample
from mlalign.loss import IGNORED, head_nll, token_nll

ROWS = [
    TaskExample([5, 9, 3, 7, 2], [IGNORED, IGNORED, 3, 7, 2], 3, "en"),
    TaskExample([4, 8], [IGNORED, 8], 1, "de"),
    TaskExample([6, 5, 4], [IGNORED] * 3, 0, "de"),
]
SCALED = {
    "cohere": _LLAMA_LIKE | {"logit_scale": 0.5},
    "granite": _LLAMA_LIKE | {"logits_scaling": 4.0},
}


@pytest.mark.parametrize("block", [1, 3, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_head_nll_is_cross_entropy_in_blocks(monkeypatch, block, with_bias):
    monkeypatch.setattr(loss, "_LOGITS", block * 11)
    torch.manual_seed(0)
    inputs = [torch.randn(7, 5), torch.randn(11, 5), torch.randn(11)]
    targets = torch.randint(0, 11, (7,))
    ours = [each.clone().requires_grad_() for each in inputs]
    exact = [each.double().requires_grad_() for each in inputs]
    found = head_nll(ours[0], ours[1], ours[2] if with_bias else None, targets)
    log_p = (exact[0] @ exact[1].T + (exact[2] if with_bias else 0)).log_softmax(-1)
    wanted = -sum(log_p[i, target] for i, target in enumerate(targets))
    (found * 0.3).backward()
    (wanted * 0.3).backward()
    torch.testing.assert_close(found.double(), wanted)
    for mine, theirs in list(zip(ours, exact))[: 3 if with_bias else 2]:
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


def test_head_nll_of_nothing_and_without_gradient():
    states, weight = torch.randn(4, 5, requires_grad=True), torch.randn(11, 5)
    head_nll(states[:0], weight, None, torch.empty(0, dtype=torch.int64)).backward()
    assert not states.grad.any()
    with torch.no_grad():
        assert not head_nll(states, weight, None, torch.zeros(4, dtype=torch.int64)).requires_grad


def test_no_more_logits_than_one_block_exist(monkeypatch):
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim == 2 and result.shape[1] == 11:
                self.rows = max(self.rows, len(result))
            return result

    monkeypatch.setattr(loss, "_LOGITS", 2 * 11)
    states, weight = torch.randn(7, 1, requires_grad=True), torch.randn(11, 1)
    with Largest() as largest:
        head_nll(states, weight, None, torch.zeros(7, dtype=torch.int64)).backward()
    assert largest.rows == 2


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *SCALED])
def test_the_loss_is_that_of_the_models_logits(monkeypatch, architecture):
    """Fused where nothing but the head makes the logits, and not where they are scaled or capped."""
    monkeypatch.setitem(ARCHITECTURES, architecture, (ARCHITECTURES | SCALED)[architecture])
    lm = build(architecture).train()
    aligned = model.AlignedModel(lm, 2, "mean").train()
    task = collate_task(ROWS, pad=0)
    inputs = {name: task[name] for name in ("input_ids", "attention_mask")}
    logits = lm(**inputs, use_cache=False).logits
    wanted = sum(
        F.cross_entropy(logits[row, place - 1].double(), torch.tensor(label), reduction="sum")
        for row, example in enumerate(ROWS)
        for place, label in enumerate(example.labels)
        if label != IGNORED
    )
    gradients = torch.autograd.grad(wanted, list(lm.parameters()))
    aligned.ask()
    assert aligned.fused == (architecture not in {"gemma2", "cohere", "granite"})
    assert lm.training
    assert aligned.chosen == (not aligned.fused)
    rows_of_logits = []
    lm.get_output_embeddings().register_forward_hook(lambda *given: rows_of_logits.append(given[2].shape[:-1].numel()))
    found = aligned(task=task)
    assert aligned.fused or rows_of_logits == [len(task["targets"])], "logits of learned tokens alone"
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(found, list(lm.parameters())), gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_an_adapted_head_keeps_its_adapter():
    lm = model.add_lora(build("llama"), Lora(target_modules=["q_proj", "lm_head"], dropout=0.0))
    aligned = model.AlignedModel(lm, 2, "mean")
    aligned.ask()
    assert not aligned.fused
    torch.nn.init.normal_(lm.get_output_embeddings().lora_B["default"].weight)
    task = collate_task(ROWS, pad=0)
    logits = lm(input_ids=task["input_ids"], attention_mask=task["attention_mask"], use_cache=False).logits
    wanted = token_nll(logits.flatten(0, 1)[task["positions"]], task["targets"])
    torch.testing.assert_close(aligned(task=task), wanted)
