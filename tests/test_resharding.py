"""What one number of ranks and ZeRO stage saved, any other goes on from: to the last bit, and with the same losses."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import train_with
from safetensors.torch import load_file

from mlalign.config import Config
from mlalign.errors import UserError

NAMES = {0: "zero0", 1: "zero1", 2: "zero2", 3: "zero3"}
OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


def whole(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """All that the files of a checkpoint hold, put together in the plainest way; fails on a gap or an overlap."""
    found: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    for file in folder.glob("trained-*.safetensors"):
        for key, values in load_file(file).items():
            what, offset, name = key.split("/", 2)
            found.setdefault((what, name), []).append((int(offset), values))
    merged = {}
    for key, pieces in found.items():
        end = 0
        for offset, values in sorted(pieces, key=lambda piece: (piece[0], len(piece[1]))):
            assert offset == end or not len(values), (key, offset, end)
            end = max(end, offset + len(values))
        merged[key] = torch.cat([values for _, values in sorted(pieces, key=lambda piece: (piece[0], len(piece[1])))])
    return merged


def step_and_save(values: dict, zero: dict, read: str | None, steps: int) -> bool:
    """Read a checkpoint if one is named, take steps, save. Returns whether the weights in use are the masters'."""
    from mlalign import checkpoint, distributed, model, resharding, sharding
    from mlalign.commands import train
    from mlalign.dataset import load_dataset
    from mlalign.loader import Loader
    from mlalign.tracker import Meter

    config = Config.model_validate(values)
    engine = train._make_engine(config, sharding.engine_config(config, zero), layer=2)
    resharding._PART = 10_000  # bytes: several files a rank
    run_dir, before = Path(values["run_dir"]), 0
    if read is not None:
        before = checkpoint.load(engine, run_dir, read)["step"]
    loader = Loader(config, load_dataset(config, model.load_tokenizer(config.model)).orders, pad=0)
    engine.train()
    for _ in range(steps):
        train._optimizer_step(engine, 1e-2, train._backward(engine, config, loader.take(), Meter()), measure=False)
    loader.close()
    checkpoint.Saver(engine, run_dir, in_background=False).save(before + steps + 1, {}, {"x": torch.ones(1)}, keep={1})
    alike = True
    if distributed.is_main():
        masters = whole(run_dir / "checkpoints" / f"step-{before + steps + 1:06d}")
    masters = distributed.broadcast_object(masters if distributed.is_main() else None)
    from deepspeed.runtime.zero import GatheredParameters

    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                master = masters["master", name].view(parameter.shape).to(parameter.dtype)
                alike = alike and torch.equal(master, parameter)
    engine.destroy()
    distributed.barrier()
    return alike


def zero(stage: int) -> dict:
    """ZeRO-3 shards what is frozen, and would keep all of the tiny model whole by default."""
    return {"zero_optimization": {"stage": stage} | ({"stage3_param_persistence_threshold": 600} if stage == 3 else {})}


@pytest.mark.parametrize(("adapters", "precision"), [("lora", "bf16"), ("full", "fp32"), ("full", "bf16")])
def test_every_layout_reads_what_every_other_wrote_to_the_last_bit(ranks, settings, precision, adapters):
    settings["model"]["precision"] = precision
    settings["lora"] = {"dropout": 0.0} if adapters == "lora" else None
    folder = Path(settings["run_dir"]) / "checkpoints"
    assert all(ranks(2).run(step_and_save, settings, zero(2), None, 2))
    wanted, number = whole(folder / "step-000003"), 3
    assert {what for what, _ in wanted} == {"master", "exp_avg", "exp_avg_sq"}
    assert all(values.any() for (what, _), values in wanted.items() if what == "exp_avg_sq")
    layouts = [(4, zero(3)), (1, zero(0)), (2, zero(1)), (1, OFFLOADED), (4, zero(0)), (2, zero(3)), (4, zero(2))]
    for size, layout in layouts:
        assert all(ranks(size).run(step_and_save, settings, layout, f"step-{number:06d}", 0)), (size, layout)
        number += 1
        found = whole(folder / f"step-{number:06d}")
        assert found.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == [], (size, layout)
        assert json.loads((folder / f"step-{number:06d}" / "state.json").read_text())["adam_steps"] == 2


class Odd(torch.nn.Module):
    """Parameters of fewer elements than there are ranks, and of a few more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sizes = torch.nn.ParameterList([torch.randn(size) for size in (1, 3, 5, 6, 7, 130)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((p * x).square().sum() for p in self.sizes)


def odd_shares(folder: str, stage: int, read: bool, steps: int) -> None:
    """Save, or read what others saved and save it again; without a step Adam has no moments yet."""
    import deepspeed
    from safetensors.torch import save_file

    from mlalign import distributed, resharding

    model = Odd()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    config["zero_allow_untested_optimizer"] = True
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), 0.1), config=config)
    place = Path(folder)
    if read:
        resharding.restore(engine, place / "first", sorted(os.listdir(place / "first")), steps)
    else:
        for _ in range(steps):
            engine.backward(engine(torch.ones(1)))
            engine.step()
    target = place / ("second" if read else "first")
    target.mkdir(exist_ok=True)
    for number, tensors in enumerate(resharding.parts(engine, copy=True)):
        save_file(tensors, target / f"trained-{distributed.rank()}-{number}.safetensors")
    assert resharding.adam_steps(engine) == steps
    engine.destroy()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("wrote", "reads"), [((4, 3), (2, 3)), ((2, 1), (4, 3)), ((4, 3), (4, 3)), ((4, 0), (4, 2))])
def test_parameters_that_ranks_cannot_share_evenly(ranks, tmp_path, wrote, reads, steps):
    ranks(wrote[0]).run(odd_shares, str(tmp_path), wrote[1], False, steps)
    ranks(reads[0]).run(odd_shares, str(tmp_path), reads[1], True, steps)
    first, second = whole(tmp_path / "first"), whole(tmp_path / "second")
    assert sorted(len(values) for (what, _), values in first.items() if what == "master") == [1, 3, 5, 6, 7, 130]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def train_until(values: dict, step: int | None) -> None:
    """The whole of `mlalign train`, sent a signal in the middle of a step."""
    taken = []

    def counted(backward, *arguments):
        taken.append(None)
        if started + len(taken) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(*arguments)

    latest = Path(values["run_dir"]) / "checkpoints" / "latest"
    started = int(latest.read_text().removeprefix("step-")) if latest.exists() else 0
    assert train_with(values, counted) == ("done" if step is None else f"after step {step}")


def losses(run_dir: str) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    found = {(line["step"], name): line[name] for line in lines for name in line if "_loss" in name or "norm" in name}
    assert len(found) == sum("_loss" in name or "norm" in name for line in lines for name in line), "doubled points"
    return found


@pytest.mark.parametrize("adapters", ["lora", "full"])
def test_a_run_goes_on_with_other_ranks_and_stages_and_the_losses_stay(ranks, settings, rows, tmp_path, adapters):
    settings["lora"] = {"dropout": 0.0} if adapters == "lora" else None
    settings["optimizer"] |= {"steps": 16, "lr": 1e-3, "eps": 1e-6}
    settings["task"]["dev"] = str(rows["task_dev"])
    settings |= {"log_every": 3, "checkpoint_every": 5, "evaluation": {"every": 8, "patience": 0}}
    straight = settings | {"run_dir": str(tmp_path / "straight")}
    ranks(1).run(train_until, straight, None)
    for size, stage, step in [(1, 2, 4), (2, 3, 8), (4, 1, 11), (2, 0, None)]:
        values = settings | {"deepspeed": f"ds_configs/zero{stage}.json"}
        values["task"] = settings["task"] | {"micro_batch_size": 2 * size}
        ranks(size).run(train_until, values, step)
    wanted, found = losses(straight["run_dir"]), losses(settings["run_dir"])
    assert {step for step, _ in wanted} == {3, 6, 8, 9, 12, 15, 16}
    assert found == pytest.approx(wanted, rel=1e-5)
    starts = (Path(settings["run_dir"]) / "environment.txt").read_text()
    assert [line.split(", ")[-1] for line in starts.splitlines() if line.startswith("host")] == [
        "1 ranks",
        "2 ranks",
        "4 ranks",
        "2 ranks",
    ]


def refusal(values: dict, name: str) -> str:
    from mlalign import checkpoint, sharding
    from mlalign.commands import train

    config = Config.model_validate(values)
    engine = train._make_engine(config, sharding.engine_config(config, zero(2)), layer=2)
    try:
        checkpoint.load(engine, Path(values["run_dir"]), name)
    except UserError as error:
        return str(error)
    finally:
        engine.destroy()
    return "read"


@pytest.mark.parametrize("lora", [{"r": 16}, {"r": 4}, {"target_modules": ["q_proj"]}])
def test_a_checkpoint_of_another_model_is_refused_on_all_ranks(ranks, settings, lora):
    ranks(2).run(step_and_save, settings, zero(2), None, 1)
    settings["lora"] |= lora
    for sentence in ranks(2).run(refusal, settings, "step-000002"):
        assert "step-000002 is of another model: lm.base_model" in sentence
        assert "elements in this one, and" in sentence


def test_a_checkpoint_of_an_older_version_is_refused(ranks, settings):
    from mlalign.checkpoint import _sealed

    folder = Path(settings["run_dir"]) / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_bytes(_sealed({"step": 1, "world_size": 2, "zero_stage": 2, "files": {}}))
    for sentence in ranks(2).run(refusal, settings, "step-000001"):
        assert "was written by another version of mlalign" in sentence
