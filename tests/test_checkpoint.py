"""Checkpoints written in the background, by two ranks with a real engine."""

import resource
from pathlib import Path

import pytest
import torch

from mlalign.config import Config
from mlalign.errors import UserError


def started(values: dict, stage: int):
    """An engine, a function that takes a step, and one that tells the trained weights."""
    from mlalign import checkpoint, distributed, model, sharding
    from mlalign.commands import train
    from mlalign.config import Config
    from mlalign.dataset import load_dataset
    from mlalign.loader import Loader
    from mlalign.tracker import Meter

    config = Config.model_validate(values)
    engine_config = sharding.engine_config(config, {"zero_optimization": {"stage": stage}})
    engine = train._make_engine(config, engine_config, layer=2)
    loader = Loader(config, load_dataset(config, model.load_tokenizer(config.model)).orders, pad=0)
    engine.train()

    def step() -> None:
        train._optimizer_step(engine, 1e-2, train._backward(engine, config, loader.take(), Meter()), measure=False)

    def weights() -> dict[str, torch.Tensor]:
        return distributed.broadcast_object(checkpoint._gathered(engine.module.lm, trainable_only=True))

    return engine, step, weights


def saved_and_loaded(values: dict, stage: int) -> list[bool]:
    """Whether things are as they should be, one by one."""
    from mlalign import checkpoint, distributed

    run_dir = Path(values["run_dir"])
    engine, step, weights = started(values, stage)
    saver = checkpoint.Saver(engine, run_dir, in_background=True)
    step()
    wanted = weights()
    own = {"number": torch.tensor(distributed.rank())}
    saver.save(1, {"said": "so"}, own, keep=set())
    found = [checkpoint.latest(run_dir) is None]
    distributed.barrier()
    step()
    step()  # what is written is of step 1 all the same
    saver.finish()
    found.append(checkpoint.latest(run_dir) == "step-000001")
    saver.save(3, {}, own, keep={1})
    while checkpoint.latest(run_dir) == "step-000001":  # a poll gives the name
        saver.poll()
        distributed.barrier()
    saver.save(4, {}, own, keep={1})
    saver.finish()
    found.append({each.name for each in run_dir.glob("checkpoints/*")} == {"latest", "step-000001", "step-000004"})
    state, read = checkpoint.load(engine, run_dir, "step-000001")
    loaded = weights()
    found += [state["said"] == "so", int(read["number"]) == distributed.rank()]
    found.append(all(torch.equal(loaded[name], wanted[name]) for name in wanted))
    engine.destroy()
    return found


@pytest.mark.parametrize(("stage", "adapters"), [(0, "lora"), (2, "full"), (3, "full")])
def test_what_is_written_in_the_background_is_of_the_step_that_saved_it(ranks, settings, stage, adapters):
    if adapters == "full":
        settings["lora"] = None
    for found in ranks(2).run(saved_and_loaded, settings, stage):
        assert all(found), found


def failing(values: dict) -> tuple[str, str | None, bool]:
    """Rank 1 cannot write more than a few KiB: what is said, and what is left."""
    from mlalign import checkpoint, distributed

    run_dir = Path(values["run_dir"])
    engine, step, _ = started(values, stage=2)
    saver = checkpoint.Saver(engine, run_dir, in_background=True)
    step()
    saver.save(1, {}, {}, keep=set())
    saver.finish()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        saver.save(2, {}, {}, keep=set())
        saver.finish()
        sentence = "nothing"
    except UserError as error:
        sentence = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    engine.destroy()
    distributed.barrier()
    return sentence, checkpoint.latest(run_dir), (run_dir / "checkpoints" / "partial").exists()


def test_a_full_disk_in_the_background_stops_all_ranks_with_one_sentence(ranks, settings):
    settings["lora"] = None
    for sentence, latest, partial in ranks(2).run(failing, settings):
        assert "cannot be written (is the disk full?), what was saved before is intact" in sentence
        assert latest == "step-000001"
        assert not partial


def test_the_optimizers_place_decides(settings):
    from mlalign.commands.train import _saves_in_background

    offloaded = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    config = Config.model_validate(settings)
    assert not _saves_in_background(config, offloaded)
    assert _saves_in_background(config.model_copy(update={"async_checkpoint": True}), offloaded)
