"""`mlalign plan`: what it says beforehand, against models, engines, files and allocations that are really there."""

import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import alone_in_the_world
from omegaconf import OmegaConf
from transformers import LlamaConfig
from typer.testing import CliRunner

from mlalign import model, sharding
from mlalign.activations import alignment_pass, on_paper, task_pass
from mlalign.collate import collate_task
from mlalign.commands.plan import Settings, plan, sbatch_lines
from mlalign.config import Alignment, Config
from mlalign.dataset import load_dataset
from mlalign.errors import UserError
from mlalign.sampler import slices
from mlalign.workload import negatives

GIB = 2**30
CPU = {"device": "cpu"}


def planned(values: dict, **settings) -> dict:
    return plan(Config.model_validate(values), Settings(**CPU | settings))


# ----------------------------------------------------------------------------------------------- parameters and states


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_parameters_are_those_of_the_model_that_train_builds(settings, lora):
    settings["lora"] = lora
    config = Config.model_validate(settings)
    lm = model.load_lm(config.model)
    lm = model.add_lora(lm, config.lora) if lora else lm
    found = planned(settings)["model"]
    assert found["parameters"] == sum(p.numel() for p in lm.parameters())
    assert found["trainable"] == sum(p.numel() for p in lm.parameters() if p.requires_grad)


def bytes_that_an_engine_holds(values: dict, zero: dict) -> int:
    """Distinct storages of all tensors between the last backward and the step, above those there were before."""
    from mlalign.commands import train
    from mlalign.loader import Loader
    from mlalign.tracker import Meter

    def alive() -> dict[int, int]:
        gc.collect()
        tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
        tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
        storages = [each.untyped_storage() for each in tensors]
        return {each.data_ptr(): each.nbytes() for each in storages if each.nbytes() < 1e9}  # no bucket

    config = Config.model_validate(values)
    dataset = load_dataset(config, model.load_tokenizer(config.model))  # rows from the cache are tensors too
    before = alive()
    engine = train._make_engine(config, sharding.engine_config(config, {"zero_optimization": zero}), layer=2)
    engine.train()
    loader = Loader(config, dataset.orders, pad=0, end=2)
    train._backward(engine, config, loader.take(), Meter())
    train._optimizer_step(engine, 1e-3, True, measure=False)
    train._backward(engine, config, loader.take(), Meter())
    after = alive()
    engine.optimizer.zero_grad()
    engine.destroy()
    return sum(size for pointer, size in after.items() if pointer not in before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_model_states_are_what_deepspeed_holds(ranks, settings, tmp_path, stage, precision):
    zero = {"stage": stage, "reduce_bucket_size": 500_000_000}  # by which it is told from the rest
    zero |= {"stage3_param_persistence_threshold": 1000} if stage == 3 else {}
    settings |= {"lora": None, "deepspeed": str(tmp_path / "zero.json")}
    settings["model"]["precision"] = precision
    Path(settings["deepspeed"]).write_text(json.dumps({"zero_optimization": zero}))
    states = planned(settings, ranks=2)["memory"]["phases"]["task pass"]
    expected = states["parameters"] + states["gradients"] + states["optimizer"]
    held = max(ranks(2).run(bytes_that_an_engine_holds, settings, zero))
    largest = 400 * 32 * (4 if precision == "fp32" else 2)  # such a tensor of an earlier engine may come and go
    assert expected == pytest.approx(held, rel=0.01, abs=1.1 * largest)


# --------------------------------------------------------------------------------------------------------- activations


def allocations(run) -> tuple[int, int]:
    """Bytes allocated by `run` and not freed by its end, and the most at any time, as torch's profiler counts them."""
    gc.collect()  # what earlier tests left would be freed meanwhile, and count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    del kept
    return now, peak


@pytest.mark.parametrize(
    ("lora", "checkpointing", "attention"),
    [({"r": 4, "dropout": 0.1}, False, "sdpa"), (None, False, "eager"), (None, True, "sdpa")],
)
def test_a_pass_allocates_what_a_real_one_does(settings, lora, checkpointing, attention):
    settings |= {"lora": lora}
    settings["model"] |= {"attention": attention, "gradient_checkpointing": checkpointing}
    config = Config.model_validate(settings)
    lm = model.load_lm(config.model)
    aligned = model.AlignedModel(model.add_lora(lm, config.lora) if lora else lm, 2, "mean").train()
    ids = torch.randint(3, 400, (6, 100))
    mask = torch.ones_like(ids)
    mask[0, 50:] = 0
    positions = torch.arange(6 * 100).view(6, 100)[:, :-1].flatten()
    task = {"input_ids": ids, "attention_mask": mask, "positions": positions, "targets": ids.flatten()[positions + 1]}
    aligned.ask()
    for parameter in aligned.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    aligned(task=task).backward()
    paper = on_paper(config, 2, torch.float32)
    found = task_pass(paper, ((6, 100),), learned=6 * 99)
    saved, _ = allocations(lambda: aligned(task=task))
    _, peak = allocations(lambda: aligned(task=task).backward())
    assert found.saved == pytest.approx(saved, rel=0.05)
    assert found.peak == pytest.approx(peak, rel=0.05)
    side = {name: task[name] for name in ("input_ids", "attention_mask")} | {"rows": torch.arange(6)}
    found = alignment_pass(paper, ((6, 100), (6, 100)), config.alignment, ranks=1, chunks=2)
    _, peak = allocations(lambda: aligned(bitext=[side, side]).square().sum().backward())
    assert found.peak - 2 * 2 * 6 * 2 * 32 * 4 == pytest.approx(peak, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------- work


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_epoch_is_what_the_sampler_deals_out(settings, ranks):
    settings["task"] |= {"language_temperature": 0.5, "batch_size": 10}
    settings["optimizer"] = {"epochs": 2}
    config = Config.model_validate(settings)
    order = load_dataset(config, model.load_tokenizer(config.model)).orders["task"]
    taken, widest, steps = [], 0, 0
    while order.epoch == 0 and len(taken) < 48:
        batch = order.take(10)
        for shares in slices(batch, 2, ranks):
            widest = max(widest, *(collate_task(share, 0)["input_ids"].numel() for share in shares))
        taken, steps = taken + batch, steps + 1
    found = planned(settings, ranks=ranks)
    task = found["work"]["task"]
    assert task["rows_per_epoch"] == 48
    assert task["tokens_per_epoch"] == sum(map(len, taken[:48]))
    assert task["steps_per_epoch"] == steps == 5
    assert task["shapes"][0][0] * task["shapes"][0][1] == widest
    assert task["micro_batches"] == 5 / ranks + (ranks == 2) / 2
    assert found["run"]["steps"] == 10


def test_negatives_are_all_other_pairs_of_what_is_contrasted():
    local = {"negatives": "local", "micro_batch_size": 8, "batch_size": 40}
    assert negatives(Alignment(train="x", batch_size=40), 2) == (39, 2 * 40 * 39)
    assert negatives(Alignment(train="x", batch_size=40, infonce="one_way"), 2) == (39, 40 * 39)
    assert negatives(Alignment(train="x", **local), 2) == (7, 2 * 2 * (8 * 7 + 8 * 7 + 4 * 3))


def test_missing_rows_are_assumed_to_be_of_max_length(settings):
    settings["task"]["train"] = "absent/*.jsonl"
    settings["optimizer"] = {"epochs": 2}
    found = planned(settings, ranks=2, tokens_per_second=100)
    assert found["work"]["task"]["missing"] == "absent/*.jsonl is not there"
    assert found["work"]["task"]["shapes"] == ((2, 200),)
    assert found["work"]["alignment"]["missing"] is None
    assert found["run"]["steps"] is None
    assert not any("--time" in line for line in found["sbatch"])


# ---------------------------------------------------------------------------------------------------------------- disk


def train_and_leave_files(values: dict) -> None:
    from mlalign.commands.train import train

    train(Config.model_validate(values))


@pytest.mark.parametrize(("stage", "lora"), [(0, None), (2, {"r": 8}), (3, None)])
def test_a_checkpoint_takes_what_its_files_take(ranks, settings, tmp_path, stage, lora):
    settings |= {"lora": lora, "deepspeed": f"ds_configs/zero{stage}.json"}
    settings["optimizer"]["steps"] = 2
    ranks(2).run(train_and_leave_files, settings)
    size = sum(path.stat().st_size for path in Path(settings["run_dir"], "checkpoints").rglob("*") if path.is_file())
    assert planned(settings, ranks=2)["disk"]["checkpoint"] == pytest.approx(size, rel=0.05)


# ----------------------------------------------------------------------------------------------------- advice and time


@pytest.fixture
def large(tmp_path, settings, tokenizer) -> dict:
    """The shape of Llama 3 8B, and no weights."""
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "8b")
    tokenizer.save_pretrained(tmp_path / "8b")
    settings["model"]["path"] = str(tmp_path / "8b")
    return settings


def test_eight_billion_parameters_in_bf16_for_gpus_that_are_not_here(large):
    found = plan(Config.model_validate(large), Settings(device="cuda", ranks=4, memory_per_gpu=80))
    assert found["model"]["precision"] == "bfloat16"
    assert found["model"]["parameters"] - found["model"]["trainable"] == 8_030_261_248
    assert found["memory"]["phases"]["task pass"]["parameters"] == pytest.approx(16_060_522_496, rel=0.01)
    needed = found["advice"]["needed"]
    assert needed["ds_configs/zero3.json"] < needed["ds_configs/zero2.json"] < needed["ds_configs/zero0.json"] * 1.2
    assert "deepspeed=ds_configs/zero0.json fits" in found["advice"]["sentence"]


def test_advice_names_the_lowest_stage_that_fits(settings):
    settings["lora"] = None
    needed = planned(settings, ranks=4, memory_per_gpu=1)["advice"]["needed"]
    lowest = next(file for file, size in needed.items() if size <= needed["ds_configs/zero2.json"])
    sentence = planned(settings, ranks=4, memory_per_gpu=needed["ds_configs/zero2.json"] / GIB)["advice"]["sentence"]
    assert sentence.startswith(f"deepspeed={lowest} fits")


def test_what_is_advised_where_nothing_fits_does_fit(settings):
    settings["task"] |= {"micro_batch_size": 8, "batch_size": 16}
    needed = planned(settings, ranks=2, memory_per_gpu=1)["advice"]["needed"]
    gib = 0.5 * min(needed.values()) / GIB
    sentence = planned(settings, ranks=2, memory_per_gpu=gib)["advice"]["sentence"]
    assert sentence.startswith("none fits")
    advised = dict(part.split("=") for part in sentence.split() if "=" in part)
    settings["deepspeed"] = advised.pop("deepspeed")
    changed = OmegaConf.create(settings)
    for key, value in advised.items():
        OmegaConf.update(changed, key, json.loads(value))
    found = planned(OmegaConf.to_container(changed), ranks=2)
    assert advised.keys() <= {"model.gradient_checkpointing", "task.micro_batch_size", "alignment.micro_batch_size"}
    assert found["memory"]["peak"] <= gib * GIB * 1.1  # the shapes are those of other micro-batches now


def test_no_more_ranks_are_advised_than_share_the_batches(settings):
    """Of 24 pairs 2, 4 and 8 ranks have the same, 16 have not."""
    settings |= {"lora": None, "alignment": settings["alignment"] | {"batch_size": 24}}
    settings["task"] |= {"batch_size": 16}
    needed = planned(settings, ranks=2, memory_per_gpu=1)["advice"]["needed"]
    for share, ranks in ((0.4, {4, 8}), (0.3, set())):
        sentence = planned(settings, ranks=2, memory_per_gpu=share * min(needed.values()) / GIB)["advice"]["sentence"]
        advised = {int(number) for number in re.findall(r"on (\d+) ranks", sentence)}
        assert advised <= ranks and (advised or not ranks), sentence


@pytest.mark.parametrize(
    ("device", "saving", "held"),
    [("cuda", "auto", True), ("cuda", False, False), ("cpu", "auto", False), ("cpu", True, True)],
)
def test_a_checkpoint_that_is_written_meanwhile_takes_host_memory(settings, device, saving, held):
    found = planned(settings | {"async_checkpoint": saving}, ranks=2, device=device)
    copied = 12 * found["model"]["trainable"] / 2
    assert found["memory"]["host"] == ({"checkpoint": pytest.approx(copied, abs=12)} if held else {})


def test_measured_steps_give_the_time(settings, tmp_path):
    settings["optimizer"] = {"epochs": 2}
    found = planned(settings, measure=1)
    tokens = 12 * (found["work"]["task"]["tokens_per_step"] + found["work"]["alignment"]["tokens_per_step"])
    assert found["time"]["tokens"] == pytest.approx(tokens)
    assert found["time"]["wall_seconds"] == pytest.approx(tokens / found["measured"]["tokens_per_second"])
    assert not Path(settings["run_dir"]).exists()


@pytest.mark.parametrize(
    ("ranks", "per_node", "seconds", "cuda", "flags"),
    [
        (8, 4, 10_000, True, "--nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --time=03:40:00"),
        (2, 4, None, True, "--nodes=1 --ntasks-per-node=2 --gpus-per-node=2"),
        (1, 8, 200_000, True, "--nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --time=2-21:40:00"),
        (6, 4, 1, False, "--nodes=2 --ntasks-per-node=3 --time=00:15:00"),
    ],
)
def test_sbatch_lines_start_one_task_per_gpu(ranks, per_node, seconds, cuda, flags):
    lines = sbatch_lines(ranks, per_node, seconds, cuda)
    assert " ".join(line.removeprefix("#SBATCH ") for line in lines) == flags


# ------------------------------------------------------------------------------------------------------------ command


@pytest.mark.parametrize(
    ("changes", "asked", "sentence"),
    [
        ({}, {"ranks": 3}, "task.batch_size is 8, which 3 ranks cannot share evenly"),
        ({"alignment.layer": 5}, {}, "alignment.layer is 5, but the model has layers 1 to 4"),
        ({"task.max_length": 300}, {}, "task.max_length is 300, but the model has 256 positions"),
        ({"model.path": "absent"}, {}, "model.path absent: no tokenizer could be loaded"),
        ({"lora.target_modules": ["query"]}, {}, "lora.target_modules ['query']"),
        ({}, {"ranks": 2, "measure": 1}, "runs on what is here, 1 ranks on CPUs"),
        ({"task.batch_size": 7, "alignment.batch_size": 7}, {"ranks": 7}, "cannot be spread evenly over nodes of 4"),
    ],
)
def test_a_mistake_is_one_sentence(settings, changes, asked, sentence):
    changed = OmegaConf.create(settings)
    for key, value in changes.items():
        OmegaConf.update(changed, key, value)
    with pytest.raises(UserError) as error:
        planned(OmegaConf.to_container(changed), **asked)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plan_is_for_gpus_unless_cpus_are_asked_for(settings, tmp_path):
    """Also on a machine that has none, where DeepSpeed is told to look for none."""
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "c.yaml")
    command = [sys.executable, "-m", "mlalign", "plan", str(tmp_path / "c.yaml"), "--json", str(tmp_path / "plan.json")]
    for asked, found in (({}, "cuda"), ({"DS_ACCELERATOR": "cpu"}, "cpu")):
        usual = {name: value for name, value in alone_in_the_world().items() if name != "DS_ACCELERATOR"}
        subprocess.run(command, env=usual | asked, check=True, capture_output=True)
        assert json.loads((tmp_path / "plan.json").read_text())["run"]["device"] == found


def test_the_command_prints_tables_and_writes_the_same_numbers(settings, tmp_path):
    from mlalign.verbs import app

    OmegaConf.save(OmegaConf.create(settings), tmp_path / "c.yaml")
    options = ["--ranks", "2", "--device", "cpu", "--tokens-per-second", "1", "--json", str(tmp_path / "plan.json")]
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "c.yaml"), "deepspeed=ds_configs/zero2.json", *options])
    assert shown.exit_code == 0, shown.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["run"] == {"ranks": 2, "device": "cpu", "deepspeed": "ds_configs/zero2.json", "steps": 3}
    assert "#SBATCH --ntasks-per-node=2" in shown.output
    for word in ("alignment pass", "negatives per step", "checkpoint", "optimizer", "c.yaml deepspeed="):
        assert word in shown.output
