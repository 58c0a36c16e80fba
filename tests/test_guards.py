"""A rank whose weights are not the others' ends the run; a step whose gradient is not finite changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
from conftest import train_with
from safetensors.torch import load_file
from torch import nn

from mlalign import guards
from mlalign.config import Config
from mlalign.errors import UserError


def sentence(bad_rank: int | None) -> str:
    from mlalign import distributed

    torch.manual_seed(1)
    lm = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    lm[0].weight.requires_grad_(False)
    if distributed.rank() == 1:
        lm[0].weight += 1  # frozen: no copy that training changes
    if distributed.rank() == bad_rank:
        with torch.no_grad():
            lm[1].weight.view(torch.int32)[2, 3] ^= 1  # one bit
    try:
        guards.refuse_diverged(lm, 7, Path("runs/x"))
    except UserError as error:
        return str(error)
    return "alike"


@pytest.mark.parametrize("bad", [1, 3])
def test_one_bit_on_one_rank_is_found_on_all(ranks, bad):
    for found in ranks(4).run(sentence, bad):
        assert found.startswith(f"after step 7 rank {bad} has other weights than rank 0, in 1.weight first")


def test_equal_copies_pass(ranks):
    assert set(ranks(4).run(sentence, None)) == {"alike"}
    assert sentence(0) == "alike", "a rank alone has no copies"


# ----------------------------------------------------------------------------------------------- what is no number


def no_loss(lm: nn.Module):
    return lm.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out * torch.nan)


def no_gradient(lm: nn.Module):
    parameter = next(p for name, p in lm.named_parameters() if p.requires_grad and "layers.1" in name)
    return parameter.register_hook(lambda gradient: gradient * torch.inf)


def train_with_faults(values: dict, fault: Callable, steps: tuple[int, ...]) -> str:
    """`mlalign train` with a fault on the last rank in those steps, from 0. Returns the sentence that it ends with."""
    from mlalign import distributed

    number = iter(range(10**9))

    def faulty(backward, engine, *arguments):
        if next(number) not in steps or distributed.rank() + 1 < distributed.world_size():
            return backward(engine, *arguments)
        handle = fault(engine.module.lm)
        try:
            return backward(engine, *arguments)
        finally:
            handle.remove()

    return train_with(values, faulty)


@pytest.mark.parametrize(
    ("zero", "fault"),
    [
        ("zero0", no_loss),
        ("zero0", no_gradient),
        ("zero1", no_loss),
        ("zero2", no_gradient),
        ("zero3", no_loss),
        ("zero3", no_gradient),
        ("zero2_offload", no_gradient),
        ("zero3_offload", no_loss),
    ],
)
def test_a_step_that_is_no_number_on_one_rank_changes_nothing_on_any(ranks, settings, zero, fault):
    settings |= {"deepspeed": f"ds_configs/{zero}.json", "log_every": 2}
    settings["optimizer"] |= {"steps": 5, "clip": 0.5, "lr": 1e-3, "eps": 1e-6}
    assert ranks(2).run(train_with_faults, settings, fault, (1, 3)) == ["done"] * 2
    run_dir = Path(settings["run_dir"])
    wanted = reference.train(Config.model_validate(settings), layer=2, left_out=(1, 3))
    found = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    for name, weight in wanted.items():  # to 1% of a step: Adam amplifies the rounding of gradients as small as its eps
        assert torch.allclose(found[name.replace(".default", "")], weight.float(), rtol=1e-4, atol=1e-5), name
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("train/skipped_steps")) for line in lines] == [(2, 1), (4, 2), (5, 2)]
    assert ["train/grad_norm" in line for line in lines] == [False, False, True]
    assert all(value == value and abs(value) < 1e9 for line in lines for value in line.values())
    assert sorted(path.name for path in (run_dir / "skipped").iterdir()) == ["step-000002.jsonl", "step-000004.jsonl"]
    rows = [json.loads(line) for line in (run_dir / "skipped" / "step-000002.jsonl").read_text().splitlines()]
    assert [row["objective"] for row in rows] == ["task"] * 8 + ["alignment"] * 8
    assert {row["rank"] for row in rows} == {0, 1}
    assert "=>" in rows[0]["text"] and rows[-1]["tgt_lang"] == "en"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_in_bf16_too(ranks, settings, tmp_path, stage):
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 600} if stage == 3 else {})  # some is sharded
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    settings |= {"deepspeed": str(tmp_path / "zero.json"), "log_every": 1}
    settings["model"]["precision"] = "bf16"
    settings["optimizer"] |= {"steps": 3, "lr": 1e-3}
    assert ranks(2).run(train_with_faults, settings, no_gradient, (0, 2)) == ["done"] * 2
    lines = [json.loads(line) for line in (Path(settings["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/skipped_steps"] for line in lines] == [1, 1, 2]
    assert all(value == value for line in lines for value in line.values())


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (2, "fp32"), (3, "bf16")])
def test_a_checkpoint_before_the_first_good_step(ranks, settings, stage, precision):
    """Adam has no moments yet, and none of its steps has been."""
    settings |= {"deepspeed": f"ds_configs/zero{stage}.json", "checkpoint_every": 1}
    settings["model"]["precision"] = precision
    settings["optimizer"] |= {"steps": 2, "max_skipped_steps": 0}
    for sentence in ranks(2).run(train_with_faults, settings, no_gradient, (1,)):
        assert sentence.startswith("the last 1 steps up to 2 gave")
    settings["optimizer"] |= {"max_skipped_steps": 5}
    settings["run_dir"] += "-other"
    assert ranks(2).run(train_with_faults, settings, no_gradient, (0,)) == ["done"] * 2
    folder = Path(settings["run_dir"]) / "checkpoints"
    counts = [json.loads((folder / f"step-00000{n}" / "state.json").read_text())["adam_steps"] for n in (1, 2)]
    assert counts == [0, 1]


def test_too_many_in_a_row_end_the_run_on_all_ranks(ranks, settings):
    settings |= {"deepspeed": "ds_configs/zero2.json", "checkpoint_every": 1}
    settings["optimizer"] |= {"steps": 9, "max_skipped_steps": 2}
    for sentence in ranks(2).run(train_with_faults, settings, no_loss, (1, 3, 4, 5, 6)):
        assert sentence.startswith("the last 3 steps up to 6 gave a non-finite loss or gradient: try a lower")
    state = json.loads((Path(settings["run_dir"]) / "checkpoints" / "step-000005" / "state.json").read_text())
    assert (state["progress"]["skipped"], state["progress"]["skipped_in_a_row"], state["adam_steps"]) == (3, 2, 2)


def told(losses: list[dict], run_dir: str) -> list[str]:
    from mlalign import distributed

    said: list[str] = []
    guards.say = lambda text, style: said.append(text)
    guards.tell_of_skipped(7, losses[distributed.rank()], [], None, Path(run_dir))
    return said


def test_whose_loss_it_was_is_said(ranks, tmp_path):
    nan, good = float("nan"), {"task": [0.5], "alignment": [1.0, 2.0]}
    some = [good, {"task": [nan], "alignment": [1.0, 2.0]}, {"task": [nan], "alignment": [2.0, nan]}, good]
    start = "WARNING: step 7 is skipped: "
    ((text,), *_) = ranks(4).run(told, some, str(tmp_path))
    both = "the task loss of rank 1, 2 and the alignment loss of rank 2 is not finite; its rows"
    assert text.startswith(start + both)
    ((text,), *_) = ranks(4).run(told, [good] * 4, str(tmp_path))
    assert text.startswith(start + "the gradient is not finite, though all losses are; its rows")
