"""Losses against naive loops in float64, and the chunked gradient against the unchunked one."""

import pytest
import reference
import torch
import torch.nn.functional as F

from mlalign import objectives
from mlalign.config import Alignment, Config
from mlalign.loss import info_nce, same_text


def unit(rows: int, hidden: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, hidden, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("duplicates", [False, True])
def test_info_nce_and_its_gradient_equal_a_double_loop(duplicates):
    anchors, candidates = unit(6, 5, 0).requires_grad_(), unit(9, 5, 1).requires_grad_()
    positives = torch.zeros(6, 9, dtype=torch.bool)
    positives[range(6), range(2, 8)] = True
    if duplicates:
        positives[0, 4] = positives[2, 2] = positives[5, 0] = True
    sets = [set(row.nonzero().flatten().tolist()) for row in positives]
    wanted = reference.info_nce(anchors, candidates, sets, 0.1)
    found = info_nce(anchors, candidates, positives, 0.1)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, (anchors, candidates)), torch.autograd.grad(wanted, (anchors, candidates))
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_info_nce_with_one_positive_is_cross_entropy():
    anchors, candidates = unit(6, 5, 0), unit(6, 5, 1)
    wanted = F.cross_entropy(anchors @ candidates.T / 0.1, torch.arange(6))
    torch.testing.assert_close(info_nce(anchors, candidates, torch.eye(6, dtype=torch.bool), 0.1), wanted)


def test_info_nce_where_all_are_positives_is_zero_with_zero_gradient():
    anchors = unit(3, 5, 0).requires_grad_()
    loss = info_nce(anchors, anchors, torch.ones(3, 3, dtype=torch.bool), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(anchors.grad, torch.zeros_like(anchors))


def test_info_nce_stays_finite_at_a_tiny_temperature():
    anchors = unit(4, 5, 0).float().requires_grad_()
    loss = info_nce(anchors, unit(4, 5, 1).float(), torch.eye(4, dtype=torch.bool), 1e-4)
    loss.backward()
    assert loss.isfinite()
    assert anchors.grad.isfinite().all()


def test_same_text_knows_repeats_of_either_side_and_of_the_id():
    keys = torch.tensor([[1, 10, 0], [2, 10, 0], [1, 11, 0], [3, 12, 7], [4, 13, 7], [13, 14, 0], [5, 15, 0]])
    wanted = torch.eye(7, dtype=torch.bool)
    for a, b in [(0, 1), (0, 2), (3, 4), (4, 5)]:  # same tgt, same src, same id, tgt of one is src of the other
        wanted[a, b] = wanted[b, a] = True
    assert torch.equal(same_text(keys, keys), wanted)


@pytest.mark.parametrize("infonce", ["symmetric", "one_way"])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_contrast_in_blocks_of_rows_equals_a_double_loop(monkeypatch, rows, infonce):
    """Pairs of one rank, 2 to 7, against those of all, 0 to 8; some of them share a sentence or an id."""
    monkeypatch.setattr(objectives, "_SIMILARITIES", rows * 9)
    monkeypatch.setattr(objectives, "_ROWS", 1)
    settings = Alignment(train="unused", infonce=infonce)
    columns = torch.stack([unit(9, 5, 0), unit(9, 5, 1)]).requires_grad_()
    keys = torch.tensor([[i, 20 + i, 0] for i in range(9)])
    keys[4, 1], keys[7, 0], keys[[3, 8], 2] = keys[2, 1], keys[0, 0], 7
    found = objectives.contrast(columns[:, 2:8], columns, keys[2:8], keys, 2, settings)
    sets = [{i} for i in range(2, 8)]
    sets[0].add(4), sets[2].add(2), sets[5].add(0), sets[1].add(8)
    wanted = reference.info_nce(columns[0, 2:8], columns[1], sets, settings.temperature)
    if infonce == "symmetric":
        wanted = (wanted + reference.info_nce(columns[1, 2:8], columns[0], sets, settings.temperature)) / 2
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    (ours,), (theirs,) = torch.autograd.grad(found, columns), torch.autograd.grad(wanted, columns)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_contrast_keeps_no_matrix_of_all_similarities():
    """What autograd holds for the backward pass, counted: rows and columns, however many pairs there are."""
    settings = Alignment(train="unused")
    pairs, hidden = 3000, 4
    embeddings = F.normalize(torch.randn(2, pairs, hidden), dim=-1).requires_grad_()
    keys = torch.arange(3 * pairs).view(3, pairs).T
    held: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = objectives.contrast(embeddings, embeddings, keys, keys, 0, settings)
    loss.backward()
    assert sum(held.values()) < pairs * pairs


STAGE_2 = {"zero_optimization": {"stage": 2}}


def gradients_in_chunks_and_in_one_graph(values: dict, zero: dict) -> tuple[float, bool]:
    """Relative error of the chunked gradient against that of one graph over the same encodings; whether both leave the
    same random state."""
    from deepspeed.utils import safe_get_full_grad

    from mlalign import distributed, model, sharding
    from mlalign.collate import collate_bitext, pair_keys
    from mlalign.commands import train
    from mlalign.dataset import load_dataset
    from mlalign.sampler import slices

    config = Config.model_validate(values)
    pairs = load_dataset(config, model.load_tokenizer(config.model)).orders["alignment"].take(20)
    chunks = [
        objectives.BitextChunk(collate_bitext(own, 0, [len(own), len(own)]), pair_keys(own))
        for own in (each[distributed.rank()] for each in slices(pairs, 2, distributed.world_size()))
    ]
    assert len(chunks) > 1

    def build(zero: dict, compiled: bool = False):
        config.model.compile = compiled
        engine = train._make_engine(config, sharding.engine_config(config, zero), layer=2)
        with torch.no_grad():
            for name, parameter in engine.module.named_parameters():
                if "lora_B" in name and not hasattr(parameter, "ds_id"):
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
        engine.train()
        torch.manual_seed(7 + distributed.rank())
        return engine

    engine = build(zero, config.model.compile)
    with objectives.one_reduction(engine):
        objectives.align_backward(engine, chunks, config.alignment, 1.0)
    drawn = objectives.random_state()
    names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    found = {n: safe_get_full_grad(p) for n, p in engine.module.named_parameters() if p.requires_grad}
    engine.destroy()

    plain = build({"zero_optimization": {"stage": 0}})
    embeddings = torch.cat([plain.module(bitext=chunk.passes) for chunk in chunks], dim=1)
    same = all(map(torch.equal, drawn, objectives.random_state()))
    objectives.alignment_loss(embeddings, torch.cat([chunk.keys for chunk in chunks]), config.alignment).backward()
    wanted = {}
    for name, p in plain.module.named_parameters():
        if p.requires_grad:
            own = p.grad if p.grad is not None else torch.zeros_like(p)
            wanted[name] = distributed.all_sum(own.clone()) / distributed.world_size()
    plain.destroy()
    difference = sum((found[n] - wanted[n]).square().sum() for n in names)
    return float((difference / sum(wanted[n].square().sum() for n in names)).sqrt()), same


def reductions_of_a_failed_step(values: dict, zero: dict) -> list[int]:
    """How often gradients were averaged when a step failed after its backward pass, there and once all is forgotten."""
    import gc

    from mlalign import model, sharding
    from mlalign.collate import collate_task
    from mlalign.commands import train
    from mlalign.dataset import load_dataset

    config = Config.model_validate(values)
    (row,) = load_dataset(config, model.load_tokenizer(config.model)).orders["task"].take(1)
    engine = train._make_engine(config, sharding.engine_config(config, zero), layer=2)
    made, found = [], []
    for name in ("_flush_coalesced_reduction_zero12", "_flush_coalesced_reduction_zero3"):
        setattr(engine, name, made.append)
    for failure in (None, MemoryError):
        try:
            with objectives.one_reduction(engine):
                objectives.task_backward(engine, [collate_task([row], 0)], row.learned, 1.0)
                if failure:
                    raise failure
        except MemoryError:
            gc.collect()
        found.append(len(made))
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_that_fails_in_a_step_does_not_wait_for_the_others(ranks, settings, stage):
    assert ranks(2).run(reductions_of_a_failed_step, settings, {"zero_optimization": {"stage": stage}}) == [[1, 1]] * 2


@pytest.mark.parametrize("stage", [2, 3])
def test_chunked_alignment_equals_one_graph_with_lora_dropout(ranks, settings, stage):
    """The same encodings with dropout 0.1, backpropagated at once, give the gradient that the chunks add up to."""
    settings["lora"]["dropout"] = 0.1
    if stage == 3:  # adapters start at zero and are sharded before a test can change that
        settings["lora"] = None
    zero = {"zero_optimization": {"stage": stage}}
    error, same_random_state = ranks(2).run(gradients_in_chunks_and_in_one_graph, settings, zero)[0]
    assert error < 1e-5
    assert same_random_state, "the next pass would drop out what this one did"


def test_compiled_blocks_drop_out_what_plain_ones_do(ranks, settings):
    """Of ten chunks, so that all are encoded twice; the plain graph they are compared with is not compiled."""
    settings["lora"]["dropout"] = 0.1
    settings["model"]["compile"] = True
    error, same_random_state = ranks(1).run(gradients_in_chunks_and_in_one_graph, settings, STAGE_2)[0]
    assert error < 1e-5
    assert same_random_state


def without_replay(values: dict) -> tuple[float, bool]:
    keep, objectives.set_random_state = objectives.set_random_state, lambda state: None
    try:
        return gradients_in_chunks_and_in_one_graph(values, STAGE_2)
    finally:
        objectives.set_random_state = keep


def test_that_comparison_would_notice_other_dropout_masks(ranks, settings):
    settings["lora"]["dropout"] = 0.1
    error, same_random_state = ranks(2).run(without_replay, settings)[0]
    assert error > 0.05
    assert not same_random_state
