"""Which objective when, and the learning rate."""

import math

import pytest
import reference
from test_world_size import ADAM, relative_error, run_steps

from mlalign.config import Config, Interleave
from mlalign.dataset import load_dataset
from mlalign.distributed import world_size
from mlalign.loader import Loader
from mlalign.model import load_tokenizer
from mlalign.schedule import Batch, batches, lr_factor, total_steps
from mlalign.sharding import engine_config


def objectives(interleave: Interleave, steps: int) -> list[str]:
    return [
        "".join(batch.objective[0] * batch.count for batch in batches(interleave, 1.0, step)) for step in range(steps)
    ]


def test_joint_holds_the_whole_ratio_in_every_step():
    assert objectives(Interleave(ratio="2:3"), 2) == ["ttaaa", "ttaaa"]
    weights = [batch.weight for batch in batches(Interleave(ratio="2:3"), 0.6, 0)]
    assert weights == pytest.approx([1.0, 0.2, 0.2, 0.2])


def test_alternate_cycles_over_steps():
    assert objectives(Interleave(mode="alternate", ratio="2:1"), 6) == ["t", "t", "a", "t", "t", "a"]


def test_micro_batch_cycles_over_batches_without_reset_and_puts_the_task_first():
    interleave = Interleave(mode="micro_batch", ratio="1:1", micro_batches=3)
    assert objectives(interleave, 3) == ["tta", "taa", "tta"]
    assert batches(interleave, 0.5, 0)[-1] == Batch("alignment", 1, 0.5 / 3)


def test_a_ratio_without_one_objective_is_the_other_alone():
    assert objectives(Interleave(ratio="1:0"), 2) == ["t", "t"]
    assert objectives(Interleave(ratio="0:2"), 2) == ["aa", "aa"]


@pytest.mark.parametrize(
    ("mode", "ratio", "wanted"),
    [
        ("joint", "1:1", 12),
        ("joint", "2:1", 6),
        ("alternate", "1:1", 23),
        ("alternate", "1:2", 34),
    ],
)
def test_epochs_count_passes_over_the_task_rows(settings, mode, ratio, wanted):
    settings["interleave"] = {"mode": mode, "ratio": ratio}
    settings["optimizer"] |= {"steps": None, "epochs": 2}
    assert total_steps(Config.model_validate(settings), rows=48) == wanted  # 12 task batches of 8


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("inverse_sqrt", lambda step: math.sqrt(10 / step)),
        ("linear", lambda step: (100 - step) / 90),
        ("cosine", lambda step: (1 + math.cos(math.pi * (step - 10) / 90)) / 2),
        ("constant", lambda step: 1.0),
    ],
)
def test_learning_rate_warms_up_and_follows_its_schedule(settings, name, formula):
    settings["optimizer"] |= {"schedule": name, "warmup_ratio": 0.1}
    factor = lr_factor(Config.model_validate(settings), steps=100)
    assert [factor(step) for step in (0, 5)] == [0, 0.5]
    for step in (10, 40, 99):
        assert factor(step) == pytest.approx(formula(step))


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(("mode", "ratio"), [("alternate", "1:1"), ("joint", "2:1"), ("joint", "1:2")])
def test_other_interleavings_equal_the_plain_loop(ranks, settings, mode, ratio, stage):
    settings["interleave"] = {"mode": mode, "ratio": ratio}
    settings["alignment"] |= {"weight": 0.5, "batch_size": 4}
    settings["optimizer"] |= {"lr": 1e-3, "steps": 4, "clip": 0.5} | ADAM
    weights, _ = ranks(2).run(run_steps, settings, {"zero_optimization": {"stage": stage}})[0]
    assert relative_error(weights, reference.train(Config.model_validate(settings), layer=2)) < 1e-5


@pytest.mark.parametrize("size", [2, 4])
def test_local_negatives_are_the_mean_of_the_ranks_own_contrasts(ranks, settings, size):
    """8 pairs on W ranks: W contrasts of 8 / W pairs, in the order in which they are dealt out."""
    settings["alignment"] |= {"infonce": "one_way", "negatives": "local", "positives": "pair", "micro_batch_size": 8}
    settings["interleave"] = {"ratio": "0:1"}
    settings["task"] = None
    found = ranks(size).run(first_loss, settings)
    config = Config.model_validate(settings)
    pairs = load_dataset(config, load_tokenizer(config.model)).orders["alignment"].take(8)
    longest_first = sorted(pairs, key=lambda pair: len(pair.src) + len(pair.tgt), reverse=True)
    lm = reference.load(config)
    for rank, loss in enumerate(found):
        own = longest_first[rank::size]
        wanted = reference.alignment_loss(lm, own, 2, 0.1, by_id=False, symmetric=False)
        assert loss == pytest.approx(float(wanted), rel=1e-5)


def first_loss(values: dict) -> float:
    from mlalign.commands import train
    from mlalign.tracker import Meter

    config, meter = Config.model_validate(values), Meter()
    engine = train._make_engine(config, engine_config(config, {"zero_optimization": {"stage": 2}}), layer=2)
    loader = Loader(config, load_dataset(config, load_tokenizer(config.model)).orders, pad=0, end=1)
    train._backward(engine, config, loader.take(), meter)
    engine.step()
    engine.destroy()
    return meter.losses()["alignment"][0].item() * world_size()


def test_micro_batch_mode_is_the_authors_objective(ranks, settings):
    settings["interleave"] = {"mode": "micro_batch", "micro_batches": 3}
    settings["alignment"] |= {"infonce": "one_way", "negatives": "local", "positives": "pair"}
    settings["optimizer"] |= {"lr": 1e-3} | ADAM
    weights, _ = ranks(1).run(run_steps, settings, {"zero_optimization": {"stage": 2}})[0]
    assert relative_error(weights, reference.authors_train(Config.model_validate(settings), layer=2)) < 1e-5
