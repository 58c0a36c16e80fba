"""One schema: what it accepts, and the sentence for what it does not."""

import json
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel

from mlalign import config as config_module
from mlalign.config import dump, load
from mlalign.errors import UserError
from mlalign.zero import read_deepspeed

ROOT = Path(__file__).parent.parent


@pytest.fixture
def path(tmp_path, settings) -> Path:
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "c.yaml")
    return tmp_path / "c.yaml"


def test_a_shipped_recipe_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("mlalign/recipes/slot_filling.yaml", ["model.path=x"]).model.path == "x"
    with pytest.raises(UserError, match=r"config recipes/slot_filling\.yaml does not exist"):
        load("recipes/slot_filling.yaml", ["model.path=x"])


def test_overrides_win_and_keep_their_types(path):
    config = load(path, ["optimizer.lr=1e-4", "alignment.layer=3", "lora=null", "task.train=[a.jsonl, b.jsonl]"])
    assert config.optimizer.lr == 1e-4
    assert config.alignment.layer == 3
    assert config.lora is None
    assert [source.path for source in config.task.train] == ["a.jsonl", "b.jsonl"]


def test_dev_rows_can_be_left_out_by_null(path):
    config = load(path, ["task.dev=null", "alignment.dev=null"])
    assert config.task.dev == config.alignment.dev == []


def test_an_unquoted_ratio_is_what_it_looks_like(path):
    assert load(path, ["interleave.ratio=2:1"]).interleave.parts == (2, 1)
    assert load(path, ["interleave.ratio='2:1'"]).interleave.parts == (2, 1)


def test_a_dumped_config_reads_back_as_the_same(path, tmp_path):
    config = load(path, ["optimizer.betas=[0.8, 0.9]"])
    (tmp_path / "dumped.yaml").write_text(dump(config))
    assert load(tmp_path / "dumped.yaml") == config
    assert config.differences(load(tmp_path / "dumped.yaml")) == []


def test_differences_name_the_keys(path):
    other = load(path, ["alignment.temperature=0.2", "run_dir=elsewhere", "log_every=1"])
    assert load(path).differences(other) == ["alignment.temperature"]


BAD = {
    ("optimiser.lr=1",): r"unknown key optimiser \(did you mean optimizer\?\)",
    ("alignment.temprature=1",): r"unknown key alignment.temprature \(did you mean temperature\?\)",
    ("alignment.temperature=0",): r"alignment.temperature is 0: input should be greater than 0",
    ("alignment.temperature=warm",): r"alignment.temperature is 'warm': input should be a valid number",
    (
        "model.packing=maybe",
    ): r"model.packing is 'maybe': input should be a valid boolean.*, or input should be 'auto'$",
    (
        "alignment.layer=deep",
    ): r"alignment.layer is 'deep': input should be a valid integer.*, or input should be 'auto'$",
    ("interleave.mode=both",): r"interleave.mode is 'both': input should be 'joint', 'alternate' or 'micro_batch'",
    ("interleave.ratio=0:0",): r"interleave.ratio is 0:0",
    ("interleave.ratio=1:0",): r"interleave.ratio 1:0 leaves `alignment` out, but it is set",
    ("task=null",): r"interleave.ratio 1:1 needs the section `task`",
    ("interleave.mode=micro_batch",): r"interleave.micro_batches is required",
    ("interleave.micro_batches=4",): r"interleave.micro_batches is required .* no meaning in others",
    ("optimizer.epochs=1",): r"either optimizer.steps or optimizer.epochs, and not both",
    ("optimizer.steps=null",): r"either optimizer.steps or optimizer.epochs",
    ("alignment.batch_size=1",): r"a single pair has no negatives",
    ("alignment.negatives=local", "alignment.micro_batch_size=1"): r"a single pair has no negatives",
    ("task.streaming=true", "task.language_temperature=0"): r"task.language_temperature must be 1 with task.streaming",
    ("task.streaming=true", "optimizer.steps=null", "optimizer.epochs=1"): r"epochs needs the number of rows",
    ("seed=-1",): r"seed is -1: input should be greater than or equal to 0",
    ("optimizer.betas=[0.9, 1]",): r"optimizer.betas.1 is 1: input should be less than 1",
    ("task.train=[]",): r"task.train is \[\]: .*at least 1 item",
    ("task.train=null",): r"task.train is \[\]: .*at least 1 item",
    ("interleave.ratio=1:2:3",): r"interleave.ratio is",
    ("alignment.train={path: a.jsonl, language: de}",): r"language belongs to task sources",
    (
        "optimizer.steps=null",
        "optimizer.epochs=.inf",
    ): r"optimizer.epochs is inf: input should be less than or equal to 10000",
    ("optimizer.lr=1e120",): r"optimizer.lr is 1e\+120: input should be less than or equal to 1000",
    ("lora.r=???",): r"override 'lora.r=\?\?\?' cannot be applied: Missing mandatory value",
    ("task.train=[a.jsonl]", "task.train.x=1"): r"override 'task.train.x=1' cannot be applied",
    ("nonsense",): r"override 'nonsense' must have the form key.subkey=value",
    ("model=null",): r"model is None",
}


@pytest.mark.parametrize("overrides", BAD, ids=" ".join)
def test_a_bad_value_is_one_sentence_with_its_key(path, overrides):
    with pytest.raises(UserError, match=BAD[overrides]) as error:
        load(path, list(overrides))
    assert "\n" not in str(error.value)


def test_bad_files_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"absent.yaml does not exist"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(UserError, match=r"broken.yaml is not valid YAML: .*line 2"):
        load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match=r"must hold `key: value` lines"):
        load(tmp_path / "list.yaml")
    (tmp_path / "missing.yaml").write_text("run_dir: x\noptimizer: {steps: 1}\ninterleave: {ratio: '1:0'}\ntask: {}")
    with pytest.raises(UserError, match=r"model is missing; task.train is missing"):
        load(tmp_path / "missing.yaml")


BAD_DEEPSPEED = {
    '{"train_batch_size": 8}': r"sets train_batch_size, which belongs into the config as task.batch_size",
    '{"bf16": {"enabled": true}}': r"sets bf16, which belongs into the config as model.precision",
    '{"gradient_clipping": 1}': r"optimizer.clip",
    '{"zero_optimisation": {}}': r"has the key zero_optimisation \(did you mean zero_optimization\?\)",
    '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}': r'optimization.reduce_bucket_size to "auto"',
    '{"zero_optimization": {"stage": 1, "overlap_comm": true}}': r"overlap_comm, which needs ZeRO stage 2 or 3",
    '{"zero_optimization": {}}': r"must set zero_optimization.stage to 0, 1, 2 or 3",
    '{"zero_optimization": {"stage": 2, "offload_optimiser": {}}}': r"offload_optimiser: .*did you mean offload_opt",
    '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}': r"zero_optimization.reduce_bucket_size: input",
    '{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}': r"zero_optimization.offload_optimizer",
    '{"zero_optimization": {"stage": 2, "compute_grad_norm": false}}': r"compute_grad_norm to false",
    '{"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}': r"needs ZeRO stage 1, 2 or 3",
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}': r"to nvme,",
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}': r"ratio below 1,",
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": true}}}': r"super_off",
    '{"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}': r"sets zenflow, which keeps",
    "{": r"not valid JSON",
    "[]": r"must hold one JSON object",
}


@pytest.mark.parametrize("text", BAD_DEEPSPEED)
def test_a_deepspeed_file_may_hold_zero_and_communication_keys_only(tmp_path, text):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=BAD_DEEPSPEED[text]):
        read_deepspeed(str(tmp_path / "ds.json"))


def test_shipped_deepspeed_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert read_deepspeed(f"ds_configs/{path.name}") == json.loads(path.read_text())
    assert read_deepspeed(None) == {"zero_optimization": {"stage": 0}}
    with pytest.raises(UserError, match=r"zero9.json does not exist; shipped in ds_configs/: zero0.json, zero1.json"):
        read_deepspeed("zero9.json")


@pytest.mark.parametrize("recipe", sorted((ROOT / "mlalign" / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_are_valid_and_open_with_their_command_and_what_to_expect(recipe):
    load(recipe)
    head = "".join(line for line in recipe.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert recipe.name in head
    assert "Expect" in head or "The paper reports" in head


SECTIONS = {
    each
    for each in vars(config_module).values()
    if isinstance(each, type) and issubclass(each, BaseModel) and each is not BaseModel
}


def keys_read(runs: list[dict]) -> set[tuple[str, str]]:
    """On one rank: (section, key) of all that training takes off its sections; what the schema itself reads aside."""
    from mlalign.commands.train import train

    found = set()
    package = Path(config_module.__file__).parent

    def record(self, name: str):
        value = BaseModel.__getattribute__(self, name)
        if name in type(self).model_fields:
            caller = sys._getframe(1).f_code
            derived = isinstance(getattr(type(self), caller.co_name, None), property)  # such as `parts`, of the ratio
            path = Path(caller.co_filename)
            if derived or (path.is_relative_to(package) and path.name != "config.py"):
                found.add((type(self).__name__, name))
        return value

    with pytest.MonkeyPatch.context() as patch:
        configs = [config_module.Config.model_validate(values) for values in runs]
        for section in SECTIONS:
            patch.setattr(section, "__getattribute__", record, raising=False)
        for config in configs:
            try:
                train(config)
            except UserError:
                pass
    return found


def test_every_key_is_read_by_a_run(ranks, settings, rows, tmp_path):
    """No dead options. Three runs: one that ends well, one whose only step is left out, and one that finds no rows."""
    (tmp_path / "dev.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    settings["task"]["dev"] = {"path": str(tmp_path / "dev.jsonl"), "language": "de"}
    settings["alignment"]["dev"] = str(rows["bitext_dev"])
    left_out = settings | {
        "run_dir": str(tmp_path / "left_out"),
        "optimizer": {"lr": 1e30, "max_skipped_steps": 0, "epochs": 1},
        "interleave": {"mode": "micro_batch", "micro_batches": 2},
    }
    absent = settings | {
        "run_dir": str(tmp_path / "absent"),
        "task": {"train": "nobody/nothing", "streaming": True},
    }
    (found,) = ranks(1).run(keys_read, [settings, left_out, absent])
    assert found == {(section.__name__, key) for section in SECTIONS for key in section.model_fields}
