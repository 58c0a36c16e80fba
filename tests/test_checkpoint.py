"""Checkpoints of two ranks with a real engine: written in the background, and damaged in every way."""

import json
import os
import random
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from mlalign import checkpoint
from mlalign.config import Config
from mlalign.durable import settle
from mlalign.errors import UserError
from mlalign.zero import offloads_optimizer, saves_in_background


def latest(run_dir: Path) -> str | None:
    pointer = run_dir / "checkpoints" / "latest"
    return pointer.read_text() if pointer.exists() else None


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
    found = [latest(run_dir) is None]
    distributed.barrier()
    step()
    step()  # what is written is of step 1 all the same
    saver.finish()
    found.append(latest(run_dir) == "step-000001")
    saver.save(3, {}, own, keep={1})
    while latest(run_dir) == "step-000001":  # a poll gives the name
        saver.poll()
        distributed.barrier()
    for number in (4, 5, 5):  # an evaluation after a resume saves the same step again
        saver.save(number, {}, own, keep={1})
    saver.finish()
    kept = {each.name for each in run_dir.glob("checkpoints/*")}
    found.append(kept == {"latest", "step-000001", "step-000004", "step-000005"})
    state = checkpoint.load(engine, run_dir, "step-000001")
    read = checkpoint.load_own(run_dir, "step-000001", distributed.rank())
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


def failing(values: dict, in_background: bool) -> tuple[str, str | None, bool]:
    """Rank 1 cannot write more than a few KiB: what is said, and what is left."""
    from mlalign import checkpoint, distributed

    run_dir = Path(values["run_dir"])
    engine, step, _ = started(values, stage=2)
    saver = checkpoint.Saver(engine, run_dir, in_background)
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
    return sentence, latest(run_dir), (run_dir / "checkpoints" / "partial").exists()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_stops_all_ranks_with_one_sentence(ranks, settings, in_background):
    settings["lora"] = None
    for sentence, named, partial in ranks(2).run(failing, settings, in_background):
        assert "cannot be written (is the disk full?), what was saved before is intact" in sentence
        assert named == "step-000001"
        assert not partial


def saved_on_hosts_of_their_own(values: dict) -> str:
    from mlalign import checkpoint, distributed

    engine, step, _ = started(values, stage=2)
    step()
    try:
        run_dir = Path(f"{values['run_dir']}-of-rank-{distributed.rank()}")
        checkpoint.Saver(engine, run_dir, in_background=False).save(1, {}, {"x": torch.ones(1)}, keep=set())
    except UserError as error:
        return str(error)
    finally:
        engine.destroy()
    return "nothing"


def test_a_run_directory_that_hosts_do_not_share_is_found_at_the_first_save(ranks, settings):
    main, other = ranks(2).run(saved_on_hosts_of_their_own, settings)
    assert "cannot be written" in main and "run_dir must be shared by all hosts" in main
    assert other == "rank 0 failed, see its message"
    assert not list(Path(settings["run_dir"]).parent.glob("*/checkpoints/step-*"))


def metrics_on_a_full_disk(values: dict) -> str:
    from mlalign.tracker import Tracker

    run_dir = Path(values["run_dir"])
    run_dir.mkdir()
    tracker = Tracker(run_dir, 0, 9)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    tracker.log(1, {"train/loss": 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, ((run_dir / "metrics.jsonl").stat().st_size, before[1]))
    try:
        tracker.log(2, {"train/loss": 2.0})
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "nothing"


def test_metrics_on_a_full_disk_are_one_sentence(ranks, settings):
    (sentence,) = ranks(1).run(metrics_on_a_full_disk, settings)
    assert "metrics.jsonl or tensorboard/ beside it cannot be written (File too large): make room" in sentence


def test_the_optimizers_place_decides(settings):
    offloaded = offloads_optimizer({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    config = Config.model_validate(settings)
    assert saves_in_background(config, cuda=True, offloads_optimizer=False)
    assert not saves_in_background(config, cuda=True, offloads_optimizer=offloaded)
    asked = config.model_copy(update={"async_checkpoint": True})
    assert saves_in_background(asked, cuda=True, offloads_optimizer=offloaded)


# ------------------------------------------------------------------------------------------------------------- damage


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def replace_by_zeros(path: Path, rng: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def damaged(values: dict, count: int) -> list[tuple[str, str | None]]:
    """Of so many damaged checkpoints: the file, and what is gone on from."""
    from mlalign import checkpoint, distributed

    run_dir, rng = Path(values["run_dir"]), random.Random(0)
    engine, step, _ = started(values, stage=2)
    saver = checkpoint.Saver(engine, run_dir, in_background=False)
    for number in (1, 2):
        step()
        saver.save(number, {"said": [1.5, None, {"a": "b"}]}, {"own": torch.ones(3)}, keep=set())
    engine.destroy()
    whole, found = run_dir / "checkpoints" / "step-000002", []
    aside = run_dir / "aside"
    if distributed.is_main():
        shutil.copytree(whole, aside)
    assert checkpoint.newest_whole(run_dir) == whole.name
    files = sorted(path.name for path in whole.iterdir())
    for number in range(count):
        file, harm = files[number % len(files)], (flip, cut, delete, replace_by_zeros, flip)[number % 5]
        if distributed.is_main():
            harm(whole / file, rng)
        distributed.barrier()
        found.append((file, checkpoint.newest_whole(run_dir)))
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(whole)
            shutil.copytree(aside, whole)
            (run_dir / "checkpoints" / "latest").write_text(whole.name)
        distributed.barrier()
    assert checkpoint.newest_whole(run_dir) == whole.name
    return found


def test_a_hundred_damaged_checkpoints_are_found_and_the_one_before_is_taken(ranks, settings):
    for found in ranks(2).run(damaged, settings, 100):
        assert len({file for file, _ in found}) > 4
        assert [(file, name) for file, name in found if name != "step-000001"] == []


def all_damaged(values: dict) -> str:
    from mlalign import checkpoint, distributed

    run_dir = Path(values["run_dir"])
    engine, step, _ = started(values, stage=2)
    saver = checkpoint.Saver(engine, run_dir, in_background=False)
    step()
    saver.save(1, {}, {}, keep=set())
    engine.destroy()
    distributed.barrier()
    if distributed.is_main():
        (run_dir / "checkpoints" / "latest").write_bytes(b"\xff\x00nonsense")
    distributed.barrier()
    assert checkpoint.newest_whole(run_dir) == "step-000001"
    distributed.barrier()
    if distributed.is_main():
        (run_dir / "checkpoints" / "step-000001").rename(run_dir / "checkpoints" / "step-000001.old")
    distributed.barrier()
    assert checkpoint.newest_whole(run_dir) == "step-000001", "killed between two renames"
    distributed.barrier()
    if distributed.is_main():
        (run_dir / "checkpoints" / "step-000001" / "state.json").write_text("[]")
    distributed.barrier()
    try:
        checkpoint.newest_whole(run_dir)
    except UserError as error:
        return str(error)
    return "nothing"


def test_where_none_is_whole_nothing_is_begun_anew_in_silence(ranks, settings):
    for sentence in ranks(2).run(all_damaged, settings):
        assert "is whole: choose another run_dir, or delete" in sentence


def an_engine() -> SimpleNamespace:
    """With as much of a full fine-tuning as `publish` looks at."""
    return SimpleNamespace(module=SimpleNamespace(lm=torch.nn.Linear(1, 1)))


@pytest.mark.parametrize("before", [None, "model", "model.old"])
def test_a_result_takes_its_name_with_the_checkpoint_of_its_step(tmp_path, before):
    """`before`: where the result of an earlier step lies, if there is one; a kill may have left it there."""
    if before:
        (tmp_path / before).mkdir()
        (tmp_path / before / "mlalign.json").write_text('{"step": 2}')
    for step, found in ((2, 2 if before else None), (5, 5)):
        aside = tmp_path / "model.partial"
        aside.mkdir()
        (aside / "mlalign.json").write_text('{"step": 5}')
        checkpoint.publish(an_engine(), tmp_path, step)
        names = [path.name for path in tmp_path.iterdir()]
        assert names == (["model"] if found else [])
        assert not found or json.loads((tmp_path / "model" / "mlalign.json").read_text())["step"] == found


@pytest.mark.parametrize("about", [None, "", "{}", '{"step": '])
def test_half_a_result_is_not_published(tmp_path, about):
    (tmp_path / "model.partial").mkdir()
    if about is not None:
        (tmp_path / "model.partial" / "mlalign.json").write_text(about)
    checkpoint.publish(an_engine(), tmp_path, 0)
    assert not any(tmp_path.iterdir())


def test_what_is_settled_can_be_read_by_who_reads_other_new_files(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "plain").touch()
    settle(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
