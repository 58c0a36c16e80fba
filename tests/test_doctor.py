"""mlalign doctor: alone, on two ranks, and what it says of everything that stops a training from starting."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import alone_in_the_world
from omegaconf import OmegaConf

from mlalign import checks, launchers
from mlalign.config import Config

PYTHON = [sys.executable, "-m", "mlalign", "doctor"]


@pytest.fixture
def recipe(tmp_path, settings):
    """recipe(**changes): a config file."""

    def write(**changes) -> Path:
        path = tmp_path / "recipe.yaml"
        OmegaConf.save(OmegaConf.merge(settings, changes), path)
        return path

    return write


def ask(*words: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*PYTHON, *map(str, words)],
        env=alone_in_the_world() | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def ask_together(words: list, second: dict[str, str], prefix: tuple[str, ...] = ()) -> tuple[int, list[str]]:
    """Two ranks; `second` and `prefix` are the environment and the command of rank 1. Exit code of rank 0, outputs."""
    port = str(launchers.free_port())
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [*command, *PYTHON, *map(str, words)],
            env=alone_in_the_world() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, (environment, command) in enumerate([({}, ()), (second, prefix)])
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return processes[0].returncode, outputs


def test_a_machine_that_can_train(recipe):
    done = ask(recipe())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("training can start")
    assert not done.stderr
    levels = [line.split()[0] for line in done.stdout.splitlines()[:-1]]
    assert set(levels) <= {"ok", "note"}
    for expected in ("torch 2.", "UTF-8", "config, tokenizer and weights are there", "1 file"):
        assert expected in done.stdout


def test_two_ranks_see_each_other(tmp_path, recipe):
    before = set(Path("/dev/shm").glob("deepspeed*"))
    code, (first, second) = ask_together([recipe()], {})
    assert code == 0, first
    assert set(Path("/dev/shm").glob("deepspeed*")) == before
    assert not second.strip()
    for expected in (
        "0-1",
        "the same on all 2 ranks",
        "all ranks see",
        "clocks",
        "GB/s bus bandwidth at 64 MiB (gloo)",
        "exact gradients of their own",
    ):
        assert expected in first
    assert not list(tmp_path.glob(".doctor-*"))


def broken_gather() -> str:
    """On one rank of two: what is said where gradients get lost on their way."""
    from mlalign import distributed
    from mlalign.commands.doctor import _gather

    usual = distributed._reduce_scatter
    try:
        distributed._reduce_scatter = lambda out, _: out.zero_()
        return _gather().level
    finally:
        distributed._reduce_scatter = usual


def test_a_network_that_loses_gradients_is_found(ranks):
    assert ranks(2).run(broken_gather) == ["problem", "problem"]


def test_other_versions_files_and_notes_on_another_rank_are_said(tmp_path, recipe):
    """Rank 1 finds an old tensorboard, cannot see what rank 0 writes, and reads ASCII."""
    fake = tmp_path / "other" / "tensorboard-2.20.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorboard\nVersion: 2.20.0\n")
    folder = tmp_path / "runs"
    folder.mkdir()
    path = recipe(run_dir=str(folder / "run"))
    blind = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {folder} && exec "$@"', "sh")
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    second = ascii_only | {"PYTHONPATH": str(tmp_path / "other")}
    code, (first, second) = ask_together([path], second, () if os.geteuid() else blind)
    assert code == 2
    assert "tensorboard is 2.20.0, tested is" in first
    assert "text files are read as" in first
    assert "tensorboard is 2.21.0 on rank 0, 2.20.0 on rank 1" in first
    if not os.geteuid():
        assert f"{folder} of rank 0 is not seen by rank 1" in first
    assert "training cannot start: locale: on" in first
    assert "rank 1: training cannot start" in second


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"task": {"train": "nowhere.jsonl"}}, "data: nowhere.jsonl does not exist or is not a file: check the path"),
        ({"model": {"path": "/no/model"}}, "model.path /no/model is not a directory: name a model's directory"),
        ({"alignment": {"layer": 9}}, "alignment.layer is 9, but the model has layers 1 to 4"),
        ({"task": {"max_length": 4000}}, "task.max_length is 4000, but the model has 256 positions"),
        ({"run_dir": "/proc/run"}, "disk: /proc cannot be written"),
        ({"model": {"compile": True}, "deepspeed": "ds_configs/zero3.json"}, "config: model.compile needs ZeRO stage"),
    ],
)
def test_what_a_recipe_lacks(recipe, changes, sentence):
    assert [sentence in problem for problem in problems_of(recipe(**changes))] == [True]


def problems_of(recipe: Path) -> list[str]:
    findings = checks.check_here(Config.model_validate(OmegaConf.to_container(OmegaConf.load(recipe))))
    return [f"{one.subject}: {one.text}" for one in findings if one.level == "problem"]


@pytest.mark.parametrize(("cuda", "level"), [(True, "problem"), (False, "note")])
def test_flash_attention_that_is_not_there(recipe, monkeypatch, cuda, level):
    monkeypatch.setattr(checks, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(checks.distributed, "uses_cuda", lambda: cuda)
    values = OmegaConf.to_container(OmegaConf.load(recipe(model={"attention": "flash_attention_2"})))
    (finding,) = checks._attention(Config.model_validate(values))
    assert (finding.level, finding.subject) == (level, "attention")
    assert "needs flash-attn and a GPU" in finding.text


@pytest.mark.parametrize(
    ("wrong", "level", "said"),
    [("", "ok", "gives what sdpa gives"), ("only on Ampere", "note", "sdpa of padded rows: .*: only on Ampere")],
)
def test_torchs_flash_attention_is_tried_on_a_gpu(monkeypatch, wrong, level, said):
    monkeypatch.setattr(checks, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(checks.distributed, "uses_cuda", lambda: True)
    monkeypatch.setattr(checks.distributed, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(checks.varlen, "wrong_kernel", lambda settings, dtype, device: wrong)
    (finding,) = checks._attention(None)
    assert finding.level == level
    assert re.search(said, finding.text)


def test_torchs_flash_attention_does_not_run_on_a_cpu():
    wrong = checks.varlen.wrong_kernel(checks._LLAMA, torch.bfloat16, torch.device("cpu"))
    assert wrong == "Could not run 'aten::_flash_attention_forward' with arguments from the 'CPU' backend"


def test_weights_that_are_not_all_there(tmp_path, recipe, tiny_model):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    path = recipe(model={"path": str(model)})
    assert ["has no weights" in problem for problem in problems_of(path)] == [True]
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (problem,) = problems_of(path)
    assert "lacks 1 of 2 shards, such as model-00002-of-00002.safetensors: copy the model anew" in problem


def test_a_hub_models_weights_are_looked_for_in_the_cache(monkeypatch, recipe):
    """Offline, as on a compute node."""
    (problem,) = problems_of(recipe(model={"path": "nobody/nothing"}))
    assert "nobody/nothing" in problem


def test_kernels_that_cannot_be_compiled(monkeypatch, tmp_path, recipe):
    path = recipe(deepspeed="ds_configs/zero2_offload.json")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    config = Config.model_validate(OmegaConf.to_container(OmegaConf.load(path)))
    (line,) = [one.text for one in checks.check_here(config) if one.subject == "kernels"]
    assert line.startswith("cpu_adam will be compiled into")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert ["there is no no-such-compiler: install it" in problem for problem in problems_of(path)] == [True]


def test_ranks_that_cannot_share_a_batch(tmp_path, recipe):
    code, (first, _) = ask_together([recipe(task={"batch_size": 7, "micro_batch_size": 1})], {})
    assert code == 2
    assert "task.batch_size is 7, which 2 ranks cannot share evenly" in first
