"""`mlalign train` as a user starts it: alone, under launchers, resumed, exported; and what it says to mistakes."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reference
import torch
from conftest import train_with
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mlalign.config import Config
from mlalign.dataset import load_dataset
from mlalign.errors import UserError
from mlalign.model import load_tokenizer

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ALONE = [sys.executable, "-m", "mlalign"]
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", "-m", "mlalign"]


@pytest.fixture
def recipe(tmp_path, settings, rows) -> dict:
    settings["task"]["dev"] = str(rows["task_dev"])
    settings["alignment"]["dev"] = str(rows["bitext_dev"])
    return settings | {"log_every": 1, "evaluation": {"every": 3}}


def start(launcher: list[str], values: dict, path: Path, **kwargs) -> subprocess.Popen:
    OmegaConf.save(OmegaConf.create(values), path)
    return subprocess.Popen(
        [*launcher, "train", str(path)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **kwargs,
    )


def run(launcher: list[str], values: dict, path: Path) -> str:
    process = start(launcher, values, path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def metrics(run_dir: str, *names: str) -> dict[tuple[int, str], float]:
    """(step, name) -> value for losses and learning rates; fails on a step that is there twice."""
    found: dict[tuple[int, str], float] = {}
    for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name.endswith(("_loss", "accuracy", "lr", "grad_norm")):
                assert (row["step"], name) not in found
                found[row["step"], name] = value
    return found


def test_alone_and_torchrun_write_the_same_losses(tmp_path, recipe):
    """All launchers are compared in test_launchers.py."""
    found = {}
    for name, launcher in (("alone", ALONE), ("torchrun", TORCHRUN)):
        values = recipe | {"run_dir": str(tmp_path / name), "deepspeed": "ds_configs/zero2.json"}
        output = run(launcher, values, tmp_path / f"{name}.yaml")
        assert "done, 3 steps" in output
        assert output.count("step 1/3  train") == 1, "only rank 0 speaks"
        found[name] = metrics(values["run_dir"])
    assert {name for _, name in found["alone"]} >= {"train/task_loss", "dev/retrieval_accuracy", "train/lr"}
    assert found["torchrun"] == pytest.approx(found["alone"], rel=1e-4)


def test_the_run_directory_holds_what_the_readme_says(tmp_path, recipe, tiny_model):
    from peft import PeftModel
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import AutoModelForCausalLM

    run(TORCHRUN, recipe | {"deepspeed": "ds_configs/zero3.json"}, tmp_path / "c.yaml")
    folder = Path(recipe["run_dir"])
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "deepspeed.json",
        "environment.txt",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "adapter",
    }
    told = json.loads((folder / "deepspeed.json").read_text())["zero_optimization"]
    assert told["stage"] == 3 and 0 < told["reduce_bucket_size"] < told["stage3_param_persistence_threshold"]
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    logged = {
        "train/task_loss",
        "train/alignment_loss",
        "train/lr",
        "train/grad_norm",
        "train/tokens_per_second",
        "train/pairs_per_second",
        "train/memory_gib",
        "train/padding",
        "dev/retrieval_accuracy",
    }
    assert set(events.Tags()["scalars"]) >= logged
    assert "config/text_summary" in events.Tags()["tensors"]
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(weight.numel() for weight in weights.values())
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder / "adapter")
    inputs = {"input_ids": torch.tensor([[1, 5, 6]])}
    base = AutoModelForCausalLM.from_pretrained(tiny_model)(**inputs).logits
    assert not torch.allclose(adapted(**inputs).logits, base)


@pytest.mark.parametrize("stage", [2, 3])
def test_full_fine_tuning_exports_a_model_that_transformers_loads(ranks, recipe, stage):
    from transformers import AutoModelForCausalLM

    values = recipe | {"lora": None, "deepspeed": f"ds_configs/zero{stage}.json"}
    assert ranks(2).run(failure, values) == ["no error"] * 2
    model, info = AutoModelForCausalLM.from_pretrained(Path(recipe["run_dir"]) / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(Path(recipe["run_dir"]) / "model").eos_token_id == 2
    assert sum(p.numel() for p in model.parameters()) > 10_000


def test_a_signal_saves_and_the_resumed_run_logs_what_an_undisturbed_one_does(tmp_path, recipe):
    """Losses are logged every 4 steps as means, so that a stop falls between two log steps."""
    recipe |= {"checkpoint_every": 1000, "evaluation": {"every": 6}, "log_every": 4}
    recipe["optimizer"] |= {"steps": 60, "lr": 1e-3}
    straight, stopped = recipe | {"run_dir": str(tmp_path / "a")}, recipe | {"run_dir": str(tmp_path / "b")}
    run(ALONE, straight, tmp_path / "a.yaml")
    process = start(ALONE, stopped, tmp_path / "b.yaml")
    log = tmp_path / "b" / "metrics.jsonl"
    while not (log.exists() and '"step": 8,' in log.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped by a signal after step" in output
    output = run(ALONE, stopped, tmp_path / "b.yaml")
    assert "resumed from" in output and "done, 60 steps" in output
    assert metrics(stopped["run_dir"]) == metrics(straight["run_dir"])


def test_a_damaged_checkpoint_costs_steps_and_changes_nothing(tmp_path, recipe):
    recipe |= {"checkpoint_every": 2, "evaluation": {"every": 100}}
    recipe["optimizer"] |= {"steps": 6}
    run(ALONE, recipe, tmp_path / "c.yaml")
    wanted, folder = metrics(recipe["run_dir"]), Path(recipe["run_dir"]) / "checkpoints"
    weights = load_file(folder.parent / "adapter" / "adapter_model.safetensors")
    file = folder / "step-000006" / "trained-0-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    output = run(ALONE, recipe, tmp_path / "c.yaml")
    assert f"WARNING: checkpoint {folder / 'step-000006'} is damaged: {file} is not what was written" in output
    assert f"resumed from {folder / 'step-000004'}" in output and "done, 6 steps" in output
    assert metrics(recipe["run_dir"]) == wanted
    again = load_file(folder.parent / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_a_second_run_on_the_same_directory_is_refused(tmp_path, recipe):
    recipe["optimizer"] |= {"steps": 100_000}
    recipe["evaluation"]["patience"] = 0  # the first must be at it for as long as the second takes to start
    first = start(ALONE, recipe, tmp_path / "c.yaml")
    log = Path(recipe["run_dir"]) / "metrics.jsonl"
    while not (log.exists() and log.read_text()):
        assert first.poll() is None
        time.sleep(0.05)
    second = start(ALONE, recipe, tmp_path / "d.yaml")
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 2, output
    assert f"run_dir {recipe['run_dir']} is in use by process {first.pid} on host" in output
    first.kill()
    first.communicate()


def test_early_stopping_keeps_the_best_and_the_last_two_checkpoints(tmp_path, recipe):
    recipe |= {"evaluation": {"every": 2, "patience": 2}}
    recipe["optimizer"] |= {"steps": 200, "lr": 0.5}  # far too high: dev gets worse
    output = run(ALONE, recipe, tmp_path / "c.yaml")
    assert "stopped early at step" in output
    steps = sorted(int(path.name[5:]) for path in (Path(recipe["run_dir"]) / "checkpoints").glob("step-*"))
    losses = {step: loss for (step, name), loss in metrics(recipe["run_dir"]).items() if name == "dev/task_loss"}
    assert steps == sorted({min(losses, key=losses.get), *sorted(losses)[-2:]})
    again = run(ALONE, recipe, tmp_path / "c.yaml")
    assert "stopped early at step" in again and "dev  task_loss" not in again


def dev_values(values: dict) -> dict[str, float]:
    from mlalign import model, sharding
    from mlalign.commands import train
    from mlalign.dataset import load_dataset
    from mlalign.evaluation import evaluate

    config = Config.model_validate(values)
    engine = train._make_engine(config, sharding.engine_config(config, {"zero_optimization": {"stage": 3}}), layer=2)
    dataset = load_dataset(config, model.load_tokenizer(config.model))
    found = evaluate(engine, config, dataset.task_dev, dataset.bitext_dev, pad=0, stop=lambda: False)
    assert evaluate(engine, config, dataset.task_dev, dataset.bitext_dev, pad=0, stop=lambda: True) is None
    assert engine.module.training
    engine.destroy()
    return found


def test_dev_values_do_not_depend_on_the_number_of_ranks(ranks, recipe):
    """7 rows and 9 pairs: on 4 ranks some have none in the last micro-batch."""
    recipe["task"]["micro_batch_size"] = 1
    recipe["alignment"] |= {"batch_size": 4, "micro_batch_size": 1}
    wanted = reference_dev_values(Config.model_validate(recipe))
    for size in (1, 2, 4):
        for found in ranks(size).run(dev_values, recipe):
            assert found == pytest.approx(wanted, rel=1e-5)


def reference_dev_values(config: Config) -> dict[str, float]:
    """One sentence at a time, with the plain losses; batches in the order of the pairs' hashes."""
    lm = reference.load(config)
    dataset = load_dataset(config, load_tokenizer(config.model))
    pairs, size = sorted(dataset.bitext_dev, key=lambda pair: pair.keys), config.alignment.batch_size
    batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    contrast = sum(len(batch) * float(reference.alignment_loss(lm, batch, 2, 0.1)) for batch in batches) / len(pairs)
    hits = []
    for language in sorted({pair.language for pair in pairs}):
        own = [pair for pair in pairs if pair.language == language]
        sides = [[reference.embed(lm, ids, 2) for ids in side] for side in zip(*((p.src, p.tgt) for p in own))]
        for src, tgt in (sides, sides[::-1]):
            found = 0
            for a, pair in zip(src, own):
                same = [other.keys[0] == pair.keys[0] or other.keys[1] == pair.keys[1] for other in own]
                right, wrong = (
                    [torch.cosine_similarity(a, b, dim=0) for b, one in zip(tgt, same) if one is wanted]
                    for wanted in (True, False)
                )
                found += not wrong or float(max(right)) > float(max(wrong))
            hits.append(found / len(own))
    return {
        "dev/task_loss": float(reference.task_loss(lm, dataset.task_dev)),
        "dev/alignment_loss": contrast,
        "dev/retrieval_accuracy": sum(hits) / len(hits),
    }


def steps_in_bf16(values: dict, stage: int) -> tuple[list[float], set]:
    from mlalign import checkpoint, model, sharding
    from mlalign.commands import train
    from mlalign.dataset import load_dataset
    from mlalign.loader import Loader
    from mlalign.tracker import Meter

    config = Config.model_validate(values)
    engine_config = sharding.engine_config(config, {"zero_optimization": {"stage": stage}})
    engine = train._make_engine(config, engine_config, layer=2)
    dataset, norms = load_dataset(config, model.load_tokenizer(config.model)), []
    loader = Loader(config, dataset.orders, pad=0, end=2)
    engine.train()
    for _ in range(2):
        with_task = train._backward(engine, config, loader.take(), Meter())
        norms.append(train._optimizer_step(engine, 1e-3, with_task, measure=True))
    dtypes = {p.dtype for p in engine.module.parameters()}
    moved = sum(float(w.abs().sum()) for n, w in checkpoint._gathered(engine.module.lm, True).items() if "lora_B" in n)
    engine.destroy()
    return norms, dtypes, moved


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_trains_with_the_gradient_norm_of_fp32(ranks, settings, stage):
    fp32, _, _ = ranks(2).run(steps_in_bf16, settings, stage)[0]
    settings["model"]["precision"] = "bf16"
    norms, dtypes, moved = ranks(2).run(steps_in_bf16, settings, stage)[0]
    assert dtypes == {torch.bfloat16}
    assert norms == pytest.approx(fp32, rel=0.1)
    assert moved > 0


def failure(values: dict, *overrides: str) -> str:
    from mlalign import distributed
    from mlalign.commands.train import train
    from mlalign.config import load

    path = Path(f"{values['run_dir']}.rank{distributed.rank()}.yaml")  # each its own: one writes while another reads
    OmegaConf.save(OmegaConf.create(values), path)
    try:
        train(load(path, list(overrides)))
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["task.train=absent.jsonl"], "absent.jsonl does not exist or is not a file"),
        (["alignment.layer=5"], "alignment.layer is 5, but the model has layers 1 to 4"),
        (["model.path={empty}"], "no tokenizer could be loaded"),
        (["task.max_length=300"], "task.max_length is 300, but the model has 256 positions"),
        (["task.max_length=2"], "task.train: every row was dropped: 0 rows"),
        (["lora.target_modules=[query]"], "lora.target_modules ['query']"),
        (["deepspeed=absent.json"], "absent.json does not exist; shipped in ds_configs/"),
        (["alignment.batch_size=1"], "a single pair has no negatives"),
        (["run_dir=/proc/nowhere"], "run_dir /proc/nowhere cannot be written"),
        (["alignment.negatives=local", "alignment.micro_batch_size=7"], "leaves a micro-batch of one pair"),
        (
            ["optimizer.lr=1e30", "optimizer.max_skipped_steps=0"],
            "the last 1 steps up to 2 gave a non-finite loss or gradient",
        ),
        (["task.columns=x"], "unknown key task.columns"),
        (["model.compile=true", "deepspeed=ds_configs/zero3.json"], "model.compile needs ZeRO stage 0, 1 or 2"),
    ],
)
def test_a_mistake_is_one_sentence(ranks, settings, tmp_path, overrides, sentence):
    (tmp_path / "empty").mkdir()
    overrides = [override.format(empty=tmp_path / "empty") for override in overrides]
    (message,) = ranks(1).run(failure, settings, *overrides)
    assert sentence in message
    assert "\n" not in message


def test_a_batch_that_ranks_cannot_share_is_one_sentence(ranks, settings):
    settings["alignment"]["batch_size"] = 9
    for message in ranks(2).run(failure, settings):
        assert message == "alignment.batch_size is 9, which 2 ranks cannot share evenly"


def test_a_run_directory_of_another_config_is_refused(ranks, settings):
    assert ranks(1).run(failure, settings) == ["no error"]
    (message,) = ranks(1).run(failure, settings, "optimizer.lr=1e-5", "seed=2")
    assert "belongs to a run with another config (different: optimizer.lr, seed)" in message
    assert ranks(1).run(failure, settings, "deepspeed=ds_configs/zero1.json", "task.micro_batch_size=4") == ["no error"]
    (message,) = ranks(1).run(failure, settings, "alignment.negatives=local")
    assert "different: alignment.negatives" in message


def test_data_that_changed_between_start_and_resume_is_refused(ranks, settings, rows, tmp_path):
    fewer = tmp_path / "task.jsonl"
    fewer.write_text(rows["task"].read_text())
    settings["task"]["train"] = str(fewer)
    settings["optimizer"] |= {"steps": None, "epochs": 1}
    assert ranks(1).run(failure, settings) == ["no error"]
    fewer.write_text("".join(rows["task"].read_text().splitlines(keepends=True)[:16]))
    (message,) = ranks(1).run(failure, settings)
    assert "was started with 48 rows of task.train, 6 steps, now the data gives 16, 2: put the data back" in message


def test_bitext_that_changed_between_start_and_resume_is_refused(ranks, settings, rows, tmp_path):
    more = tmp_path / "bitext.jsonl"
    more.write_text(rows["bitext"].read_text())
    settings["alignment"]["train"] = str(more)
    assert ranks(1).run(failure, settings) == ["no error"]
    lines = more.read_text().splitlines(keepends=True)
    more.write_text("".join([*lines, *lines[:2]]))
    (message,) = ranks(1).run(failure, settings)
    assert f"was started with {len(lines)} rows of alignment.train, now the data gives {len(lines) + 2}" in message


@pytest.mark.parametrize("dev", [False, True])
def test_a_signal_in_the_last_step_leaves_the_adapter_to_be_written(settings, rows, tmp_path, dev):
    """Without dev rows, where it is written once, at the end; or by an evaluation, and the last may be the best."""
    if dev:
        settings |= {"task": settings["task"] | {"dev": str(rows["task_dev"])}, "evaluation": {"every": 2}}
    steps = []

    def signalled(backward, *arguments):
        steps.append(None)
        if len(steps) == settings["optimizer"]["steps"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(*arguments)

    assert train_with(settings, signalled) == f"after step {len(steps)}"
    adapter = Path(settings["run_dir"]) / "adapter/adapter_model.safetensors"
    assert adapter.exists() == dev
    assert train_with(settings, signalled) == "done"
    straight = settings | {"run_dir": str(tmp_path / "straight")}
    assert train_with(straight, lambda backward, *arguments: backward(*arguments)) == "done"
    assert adapter.read_bytes() == (Path(straight["run_dir"]) / "adapter/adapter_model.safetensors").read_bytes()


def test_a_tokenizer_with_several_chat_templates_is_exported(ranks, settings, tmp_path, tiny_model, tokenizer):
    """transformers puts those into a directory of their own."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "several"))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    several = copy.deepcopy(tokenizer)
    several.chat_template = {"default": tokenizer.chat_template, "tool_use": tokenizer.chat_template}
    several.save_pretrained(model)
    settings["model"]["path"] = str(model)
    assert ranks(1).run(failure, settings) == ["no error"]
    exported = AutoTokenizer.from_pretrained(Path(settings["run_dir"]) / "adapter")
    assert exported.chat_template == several.chat_template


def published(values: dict) -> tuple[list[int], list[int]]:
    """Steps of exports, and of results that took their names; checkpoints are written slower than steps are taken."""
    from mlalign import checkpoint
    from mlalign.commands.train import train

    exported, named = [], []

    def slowly(*given):
        time.sleep(0.5)
        return write(*given)

    def noting(engine, run_dir, step):
        aside = checkpoint._exported_at(run_dir / "adapter.partial")
        named.extend([step] * (aside == step))
        publish(engine, run_dir, step)

    def exporting(engine, tokenizer, run_dir, about, touch):
        exported.append(about["step"])
        export(engine, tokenizer, run_dir, about, touch)

    write, publish, export = checkpoint._write_files, checkpoint.publish, checkpoint.export
    patches = {"_write_files": slowly, "publish": noting, "export": exporting}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in patches.items():
            patch.setattr(checkpoint, name, value)
        train(Config.model_validate(values))
    return exported, named


def test_no_result_is_lost_to_the_next_one_while_its_checkpoint_is_written(ranks, settings, rows):
    settings["task"]["dev"] = str(rows["task_dev"])
    settings |= {"evaluation": {"every": 1, "patience": 0}, "async_checkpoint": True}
    ((exported, named),) = ranks(1).run(published, settings)
    assert len(exported) > 1
    assert named == exported


def test_rows_that_were_edited_are_not_gone_on_with(ranks, settings, tmp_path):
    """As many rows as before, so that every place in the order would mean another row in silence."""
    path = Path(shutil.copy(settings["task"]["train"], tmp_path))
    settings["task"]["train"] = str(path)
    assert ranks(1).run(failure, settings) == ["no error"]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    (message,) = ranks(1).run(failure, settings)
    assert message.startswith(f"the rows of task.train are not those that {settings['run_dir']} was started with")
    path.write_text("\n".join(lines) + "\n")
    assert ranks(1).run(failure, settings) == ["no error"]


def test_an_adapter_of_an_earlier_start_is_written_anew(ranks, settings):
    assert ranks(1).run(failure, settings) == ["no error"]
    run_dir = Path(settings["run_dir"])
    shutil.rmtree(run_dir / "checkpoints")
    adapter = run_dir / "adapter/adapter_model.safetensors"
    adapter.write_bytes(b"of before")
    assert ranks(1).run(failure, settings) == ["no error"]
    assert adapter.stat().st_size > 100


def test_the_command_line_prints_the_sentence_and_exits_with_2(tmp_path, settings):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    settings["task"]["train"] = str(tmp_path / "bad.jsonl")
    process = start(ALONE, settings, tmp_path / "c.yaml")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"mlalign: error: {tmp_path}/bad.jsonl:2: not valid JSON" in output
    assert "Traceback" not in output
