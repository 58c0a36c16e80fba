"""merge: against deltas added by hand on the full weights, dense SVDs, and peft's own functions; and every refusal."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, write_jsonl
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mlalign import merging
from mlalign.commands.evaluate import Settings as Evaluation
from mlalign.commands.evaluate import evaluate
from mlalign.commands.merge import Settings, merge
from mlalign.errors import UserError
from mlalign.merging import Recipe, merge_adapters, read_adapter
from mlalign.plots import plot_curve
from mlalign.rundir import locked
from mlalign.tracker import console

ARCHITECTURES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CPU = torch.device("cpu")

#: Pairs of adapters by what is different about them: peft's settings of the task's and of the alignment's.
PAIRS = {
    "alike": ({"target_modules": EVERY}, {"target_modules": EVERY}),
    "ranks and alphas": (
        {"r": 4, "lora_alpha": 7, "target_modules": EVERY},
        {"r": 6, "lora_alpha": 32, "target_modules": EVERY},
    ),
    "rslora": (
        {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": EVERY},
        {"r": 8, "lora_alpha": 16, "target_modules": EVERY},
    ),
    "patterns": (
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": EVERY,
            "rank_pattern": {"up_proj": 7, r".*\.1\.self_attn\.q_proj": 2},
            "alpha_pattern": {"^model.layers.2.mlp.up_proj": 5},
        },
        {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": EVERY, "alpha_pattern": {"v_proj": 9}},
    ),
    "other modules": ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, {"target_modules": ["v_proj", "down_proj"]}),
    "other layers": (
        {"target_modules": EVERY},
        {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [0, 1]},
    ),
    "neither knows all": (
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 3]},
        {"target_modules": r".*\.[02]\.mlp\.(up|down)_proj"},
    ),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request, tmp_path_factory) -> str:
    return make_base(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return make_base("llama", tmp_path_factory.mktemp("llama"))


def make_base(architecture: str, path: Path) -> str:
    config, model = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model(
        config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
            tie_word_embeddings=False,
        )
    ).save_pretrained(path)
    return str(path)


def load(base: str, adapter: Path | None = None, dtype=torch.float32):
    """The base model, with an adapter as peft loads it; what peft warns of fails the test."""
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if adapter is None:
        return lm.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers to peft
        return PeftModel.from_pretrained(lm, adapter).eval()


def make_adapter(base: str, folder: Path, seed: int, dtype=torch.float32, **settings) -> Path:
    """An adapter with random A and B, saved by peft."""
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"} | settings
    lm = get_peft_model(load(base, dtype=dtype), LoraConfig(**settings), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lm.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.2).to(dtype)
    lm.save_pretrained(folder)
    return folder


@pytest.fixture
def pair(llama, tmp_path) -> tuple[Path, Path]:
    """Two adapters of different ranks on every Linear of the blocks."""
    task = make_adapter(llama, tmp_path / "task", 1, r=4, lora_alpha=8, target_modules=EVERY)
    return task, make_adapter(llama, tmp_path / "alignment", 2, r=3, lora_alpha=8, target_modules=EVERY)


def deltas(base: str, adapter: Path, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Module -> its delta, as peft itself adds it to the weights."""
    modules = load(base, adapter, dtype).get_base_model().named_modules()
    return {name: each.get_delta_weight("default").float() for name, each in modules if isinstance(each, LoraLayer)}


def added(base: str, *parts: tuple[float, dict[str, torch.Tensor]]):
    """The base model with weighted deltas added to its weights."""
    lm = load(base)
    with torch.no_grad():
        for weight, each in parts:
            for name, delta in each.items():
                lm.get_submodule(name).weight += weight * delta
    return lm


@torch.no_grad()
def logits(lm) -> torch.Tensor:
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(5))
    return lm(input_ids=ids).logits.float()


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal logits, relative to the largest one."""
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def run(first: Path, second: Path, output: Path, **settings) -> dict:
    return merge(Settings(str(first), str(second), output, **settings))


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Equal deltas, relative to the largest entry; a module without delta is the same as zeros."""
    for name in found.keys() | wanted.keys():
        ours, theirs = found.get(name, torch.zeros(())), wanted.get(name, torch.zeros(()))
        assert (ours - theirs).abs().max() <= tolerance * max(ours.abs().max(), theirs.abs().max()), name


# ------------------------------------------------------------------------------------------------------------ linear


@pytest.mark.parametrize("kind", PAIRS)
def test_linear_is_the_sum_of_deltas_on_the_full_weights(kind, base, tmp_path):
    task = make_adapter(base, tmp_path / "task", 1, **PAIRS[kind][0])
    alignment = make_adapter(base, tmp_path / "alignment", 2, **PAIRS[kind][1])
    of_task, of_alignment = deltas(base, task), deltas(base, alignment)
    for weight, alone in ((0.0, task), (0.3, None), (1.0, alignment)):
        output = tmp_path / f"merged-{weight}"
        run(task, alignment, output, weight=weight)
        parts = [(share, each) for share, each in ((1 - weight, of_task), (weight, of_alignment)) if share]
        wanted: dict = {}
        for share, each in parts:
            wanted = {name: wanted.get(name, 0) + share * each.get(name, 0) for name in wanted | each}
        found = deltas(base, output)
        assert found.keys() == wanted.keys(), "no module without a delta is touched"
        assert_same(found, wanted, 1e-6)
        reference = logits(added(base, *parts))
        merged = load(base, output)
        assert_close(logits(merged), reference)
        assert_close(logits(merged.merge_and_unload()), reference)
        if alone:
            assert_close(logits(load(base, output)), logits(load(base, alone)))


def test_scaling_by_hand(llama, tmp_path):
    """alpha / r, and alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023), with peft's patterns."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 9}}
    for rslora, wanted in ((False, {"q_proj": 6 / 4, "v_proj": 5 / 9}), (True, {"q_proj": 6 / 2, "v_proj": 5 / 3})):
        folder = make_adapter(
            llama, tmp_path / str(rslora), 1, use_rslora=rslora, alpha_pattern={"v_proj": 5}, **settings
        )
        weights = load_file(folder / "adapter_model.safetensors")
        for module, (b, a) in read_adapter(str(folder), "adapter").factors.items():
            key = f"base_model.model.{module}.lora_"
            scaling = wanted[module.rpartition(".")[2]]
            torch.testing.assert_close(b, scaling * weights[f"{key}B.weight"])
            assert torch.equal(a, weights[f"{key}A.weight"])


def test_bf16_adapters_merge_in_fp32(base, tmp_path):
    """Deltas are exact to fp32; in bf16 the logits are off by about what they are off by without an adapter."""
    settings = {"r": 4, "lora_alpha": 7, "target_modules": EVERY}
    task = make_adapter(base, tmp_path / "task", 1, torch.bfloat16, **settings)
    alignment = make_adapter(base, tmp_path / "alignment", 2, torch.bfloat16, **settings)
    assert load_file(task / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16
    run(task, alignment, tmp_path / "merged", weight=0.3)
    assert load_file(tmp_path / "merged/adapter_model.safetensors").popitem()[1].dtype == torch.float32
    of_task, of_alignment = deltas(base, task), deltas(base, alignment)
    wanted = {name: 0.7 * of_task[name] + 0.3 * of_alignment[name] for name in of_task}
    assert_same(deltas(base, tmp_path / "merged"), wanted, 1e-6)
    reference = logits(added(base, (1.0, wanted)))
    error = (logits(load(base, tmp_path / "merged", torch.bfloat16)) - reference).norm() / reference.norm()
    without = (logits(load(base, dtype=torch.bfloat16)) - logits(load(base))).norm() / logits(load(base)).norm()
    assert error < 2.5 * without < 0.05


def test_above_layers_the_task_adapter_stays_whole(llama, tmp_path):
    modules = [*EVERY, "lm_head"]
    task = make_adapter(llama, tmp_path / "task", 1, target_modules=modules)
    alignment = make_adapter(llama, tmp_path / "alignment", 2, r=3, target_modules=modules)
    for layers in (1, 2, 4):
        run(task, alignment, tmp_path / f"{layers}", weight=0.4, layers=layers)
        of_task, of_alignment = deltas(llama, task), deltas(llama, alignment)
        below = {f"model.layers.{number}." for number in range(layers)}
        wanted = {
            name: 0.6 * delta + 0.4 * of_alignment[name] if name.startswith(tuple(below)) else delta
            for name, delta in of_task.items()
        }
        assert_same(deltas(llama, tmp_path / f"{layers}"), wanted)
    assert wanted["lm_head"] is of_task["lm_head"]


def test_weight_one_with_layers_swaps_the_lower_blocks(pair, llama, tmp_path):
    run(*pair, tmp_path / "out", weight=1, layers=2)
    of_task, of_alignment = (deltas(llama, each) for each in pair)
    wanted = {n: of_alignment[n] if merging.block(n) < 2 else d for n, d in of_task.items()}
    assert_same(deltas(llama, tmp_path / "out"), wanted)


# -------------------------------------------------------------------------------------------------------------- rank


@pytest.mark.parametrize("rank", [1, 3, 5, 7])
def test_a_cut_to_a_rank_is_the_best_there_is(rank, pair, llama, tmp_path):
    result = run(*pair, tmp_path / "out", weight=0.3, rank=rank)
    of_task, of_alignment = (deltas(llama, each) for each in pair)
    left = whole = 0.0
    shares = {}
    for name, found in deltas(llama, tmp_path / "out").items():
        dense = (0.7 * of_task[name] + 0.3 * of_alignment[name]).double()
        u, values, v = torch.linalg.svd(dense, full_matrices=False)
        best = u[:, :rank] @ values[:rank].diag() @ v[:rank]
        torch.testing.assert_close(found.double(), best, rtol=1e-5, atol=1e-5 * float(values[0]))
        errors = [float((dense - each).norm()) for each in (found, best)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-5, abs=1e-5)
        shares[name] = float(values[:rank].square().sum() / values.square().sum())
        left, whole = left + float(values[:rank].square().sum()), whole + float(values.square().sum())
    assert result["rank"] == rank == json.loads((tmp_path / "out/adapter_config.json").read_text())["r"]
    assert result["kept"]["share"] == pytest.approx(left / whole, abs=2e-6)
    assert result["kept"]["worst_share"] == pytest.approx(min(shares.values()), abs=2e-6)
    assert (result["kept"]["share"] == 1) == (rank == 7)


def test_the_cut_never_makes_the_matrix():
    """[200,000, 4] @ [4, 200,000] would take 160 GB."""
    b, a = torch.randn(200_000, 4), torch.randn(4, 200_000)
    short_b, short_a = merging.truncate(b, a, 4)
    rows = torch.tensor([0, 17, 199_999])
    torch.testing.assert_close(short_b[rows] @ short_a[:, rows], b[rows] @ a[:, rows], rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- sparse methods


def two_deltas(shape=(48, 40)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_dare_linear_is_that_of_peft(density):
    for weight in (0.3, 0.5):
        torch.manual_seed(7)
        found = merging.combine(two_deltas(), [1 - weight, weight], "dare_linear", density)
        torch.manual_seed(7)
        wanted = merge_utils.dare_linear(two_deltas(), torch.tensor([1 - weight, weight]), density)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_of_equal_weights_is_pefts_sum_before_its_division(method, density):
    """peft, like the paper, divides by the number of adapters that agree on an entry."""
    torch.manual_seed(7)
    found = merging.combine(two_deltas(), [0.5, 0.5], method, density)
    torch.manual_seed(7)
    mean = getattr(merge_utils, method)(two_deltas(), torch.tensor([0.5, 0.5]), density)
    torch.manual_seed(7)
    ones = [torch.sign(delta) for delta in pruned(method, density)]
    agreeing = sum((one == torch.sign(mean)) & (one != 0) for one in ones)
    torch.testing.assert_close(found, mean * agreeing, rtol=1e-6, atol=1e-7)


def pruned(method: str, density: float) -> list[torch.Tensor]:
    how = ("magnitude", False) if method == "ties" else ("random", True)
    return [merge_utils.prune(delta, density, how[0], rescale=how[1]) for delta in two_deltas()]


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
def test_ties_by_a_loop_over_entries(weight):
    task, alignment = (delta.double() for delta in two_deltas((7, 6)))
    found = merging.combine([task, alignment], [1 - weight, weight], "ties", 0.5)
    kept = [set(each.abs().flatten().topk(21).indices.tolist()) for each in (task, alignment)]
    for place in range(42):
        values = [
            share * float(each.flatten()[place]) * (place in keep)
            for each, keep, share in zip((task, alignment), kept, (1 - weight, weight))
        ]
        sign = 1 if sum(values) >= 0 else -1
        wanted = sum(value for value in values if value * sign > 0)
        assert float(found.flatten()[place]) == pytest.approx(wanted, abs=1e-12)


def test_the_weight_of_ties_goes_from_one_adapter_to_the_other():
    task, alignment = two_deltas()
    for weight, near in ((1e-6, task), (1 - 1e-6, alignment)):
        found = merging.combine([task, alignment], [1 - weight, weight], "ties", 1.0)
        torch.testing.assert_close(found, near, rtol=1e-4, atol=1e-4)
    delta = two_deltas()[0]
    torch.testing.assert_close(merging.combine([delta, delta], [0.7, 0.3], "ties", 1.0), delta)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_sparse_methods_merge_deltas_and_not_factors(method, pair, llama, tmp_path):
    """At full rank the written adapter is the dense result of every module, seeded by the module's name."""
    density = 0.6
    result = run(*pair, tmp_path / "out", method=method, weight=0.5, density=density, rank=16, layers=3)
    of_task, of_alignment = (deltas(llama, each) for each in pair)
    found = deltas(llama, tmp_path / "out")
    assert result["settings"]["density"] == density
    for name, delta in of_task.items():
        if merging.block(name) >= 3:
            assert_same({name: found[name]}, {name: delta})
            continue
        with merging._seeded(f"0 {name}", CPU):
            dense = merging.combine([delta, of_alignment[name]], [0.5, 0.5], method, density)
        u, values, v = torch.linalg.svd(dense, full_matrices=False)
        best = u[:, :16] @ values[:16].diag() @ v[:16]
        assert_same({name: found[name]}, {name: best}, 2e-5)
        assert values[16:].norm() > 0.01 * values.norm() or min(dense.shape) == 16


def test_dare_with_density_one_is_linear(pair, llama, tmp_path):
    run(*pair, tmp_path / "dare", method="dare_linear", weight=0.3, density=1.0)
    run(*pair, tmp_path / "linear", weight=0.3)
    assert_same(deltas(llama, tmp_path / "dare"), deltas(llama, tmp_path / "linear"), 2e-5)


@pytest.mark.parametrize("method", merging.METHODS)
def test_adapters_that_are_zero_merge_into_zero(method, pair, tmp_path):
    """As an alignment adapter is above its layer: B as it was before training."""
    for folder in pair:
        change_weights(folder, lambda weights: [weight.zero_() for key, weight in weights.items() if "lora_B" in key])
    result = run(*pair, tmp_path / "out", method=method, rank=2)
    assert result["kept"]["share"] == result["kept"]["worst_share"] == 1
    for module, (b, a) in read_adapter(str(tmp_path / "out"), "adapter").factors.items():
        assert not (b @ a).any(), module


def test_a_module_of_one_adapter_is_zero_in_the_other_for_every_method(llama, tmp_path):
    task = make_adapter(llama, tmp_path / "task", 1, target_modules=["q_proj"])
    alignment = make_adapter(llama, tmp_path / "alignment", 2, target_modules=["v_proj"])
    of_task, of_alignment = deltas(llama, task), deltas(llama, alignment)
    for method in ("linear", "dare_linear", "ties", "dare_ties"):
        settings = {} if method == "linear" else {"density": 1.0}
        run(task, alignment, tmp_path / method, method=method, weight=0.75, **settings)
        wanted = {name: 0.25 * delta for name, delta in of_task.items()}
        wanted |= {name: 0.75 * delta for name, delta in of_alignment.items()}
        assert_same(deltas(llama, tmp_path / method), wanted, 2e-5)


def test_dare_depends_on_the_seed_and_not_on_the_order_of_modules(pair):
    task, alignment = (read_adapter(str(each), "adapter") for each in pair)
    recipe = Recipe(0.5, "dare_ties", density=0.3)
    before = torch.random.get_rng_state()
    first = merge_adapters(task, alignment, recipe, CPU)
    assert torch.equal(torch.random.get_rng_state(), before), "the global random state is left alone"
    torch.manual_seed(99)
    again = merge_adapters(task, alignment, recipe, CPU)
    few = {name: task.factors[name] for name in reversed(sorted(task.factors)[5:9])}
    alone = merge_adapters(replace(task, factors=few), replace(alignment, factors=few), recipe, CPU)
    other = merge_adapters(task, alignment, replace(recipe, seed=1), CPU)
    for name, (b, a) in first.factors.items():
        assert torch.equal(b @ a, again.factors[name][0] @ again.factors[name][1])
        assert not torch.allclose(b @ a, other.factors[name][0] @ other.factors[name][1])
    same = merge_adapters(replace(alignment, factors=few), replace(task, factors=few), recipe, CPU)
    assert alone.factors.keys() == same.factors.keys() == few.keys()
    for name in few:
        with merging._seeded(f"0 {name}", CPU):
            dense = merging.combine([few[name][0] @ few[name][1]] * 2, [0.5, 0.5], "dare_ties", 0.3)
        b, a = merging.factorise(dense, 8)
        assert_same({name: alone.factors[name][0] @ alone.factors[name][1]}, {name: b @ a}, 1e-4)


# ----------------------------------------------------------------------------------------------------------- writing


def test_what_is_written(pair, llama, tmp_path):
    (pair[0] / "mlalign.json").write_text(json.dumps({"supervised": ["en", "de"], "aligned": []}))
    (pair[1] / "mlalign.json").write_text(json.dumps({"supervised": [], "aligned": ["de", "sw"]}))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    pair[1].rename(run_dir / "adapter")
    with console.capture() as capture:
        result = run(pair[0], run_dir, tmp_path / "out", weight=0.25)
    assert "linear, weight 0.25: 28 modules of rank 7" in capture.get()
    names = {"adapter_config.json", "adapter_model.safetensors", "merge.json", "mlalign.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert json.loads((tmp_path / "out/mlalign.json").read_text()) == {
        "supervised": ["en", "de"],
        "aligned": ["de", "sw"],
    }
    assert json.loads((tmp_path / "out/merge.json").read_text()) == result
    assert result["inputs"]["alignment"]["path"] == str(run_dir / "adapter")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["rank_pattern"]) == (7, 7, False, {})
    assert (config["target_modules"], config["lora_dropout"], config["inference_mode"]) == (sorted(EVERY), 0.1, True)
    assert config["base_model_name_or_path"] == llama
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    assert weights["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (7, 32)
    assert weights["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].shape == (64, 7)


def test_full_names_only_where_short_ones_would_touch_more(llama, tmp_path):
    task = make_adapter(llama, tmp_path / "task", 1, target_modules=["q_proj", "v_proj"])
    lower = make_adapter(llama, tmp_path / "lower", 2, target_modules=["v_proj", "up_proj"], layers_to_transform=[0])
    whole = make_adapter(llama, tmp_path / "whole", 2, target_modules=["v_proj", "up_proj"])

    def targets(name: str) -> list[str]:
        return json.loads((tmp_path / name / "adapter_config.json").read_text())["target_modules"]

    run(task, whole, tmp_path / "short")
    assert targets("short") == ["q_proj", "up_proj", "v_proj"]
    run(task, whole, tmp_path / "zero", weight=0)
    assert targets("zero") == ["q_proj", "v_proj"]
    run(task, lower, tmp_path / "full")
    assert len(targets("full")) == 9 and "model.layers.0.mlp.up_proj" in targets("full")
    run(task, whole, tmp_path / "cut", layers=2)
    assert len(targets("cut")) == 10 and "model.layers.1.mlp.up_proj" in targets("cut")


def test_again_into_the_same_directory(pair, llama, tmp_path):
    run(*pair, tmp_path / "out", weight=0.3)
    first = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    run(*pair, tmp_path / "out", weight=0.6)
    run(*pair, tmp_path / "out", weight=0.3)
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == first
    other = make_adapter(llama, tmp_path / "other", 9, target_modules=EVERY)
    with locked(tmp_path / "out", "output"), pytest.raises(UserError, match=r"output .*out is in use by process"):
        run(*pair, tmp_path / "out")
    with pytest.raises(UserError, match="out holds an adapter that was not made of these two"):
        run(pair[0], other, tmp_path / "out")
    with pytest.raises(UserError, match="task holds an adapter that was not made of these two"):
        run(*pair, pair[0])
    for name, what in (("metrics.jsonl", "a run of `mlalign train`"), ("config.json", "a model")):
        folder = tmp_path / name.replace(".", "")
        folder.mkdir()
        (folder / name).touch()
        with pytest.raises(UserError, match=f"is {what}"):
            run(*pair, folder)


def test_what_is_left_out_is_said(llama, tmp_path):
    task = make_adapter(llama, tmp_path / "task", 1, target_modules=EVERY)
    low = make_adapter(llama, tmp_path / "low", 2, target_modules=EVERY, layers_to_transform=[0, 1])
    high = make_adapter(llama, tmp_path / "high", 2, target_modules=EVERY)
    with console.capture() as capture:
        run(task, low, tmp_path / "1")
        run(task, low, tmp_path / "2", layers=2)
        run(task, high, tmp_path / "3", layers=2)
    lines = [line for line in capture.get().splitlines() if str(tmp_path / "low") in line or "above" in line]
    assert "low is zero above layer 2: with --layers 2 the task adapter stays whole there" in lines[0]
    assert "high is not zero in 14 modules above layer 2: left out" in lines[-1]
    assert len(lines) == 2


# ---------------------------------------------------------------------------------------------------------- refusals


def change_config(folder: Path, **values) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"use_dora": True}, "task: use_dora is set"),
        ({"bias": "all"}, "task: bias is 'all'"),
        ({"lora_bias": True}, "task: lora_bias is set"),
        ({"modules_to_save": ["lm_head"]}, "task: modules_to_save is set"),
        ({"trainable_token_indices": [5]}, "task: trainable_token_indices is set"),
        ({"layer_replication": [[0, 4], [2, 4]]}, "task: layer_replication is set"),
        ({"target_parameters": ["experts.gate"]}, "task: target_parameters is set"),
        ({"alora_invocation_tokens": [1, 2]}, "task: alora_invocation_tokens is set"),
        ({"use_of_2031": True}, "task: use_of_2031 is set"),
        ({"peft_type": "LOHA"}, "task: peft_type is LOHA, and only LORA"),
        ({"peft_type": "absent"}, "task: peft_type is None, and only LORA"),
        ({"init_lora_weights": "pissa_niter_16"}, "task: init_lora_weights is 'pissa_niter_16'"),
        ({"r": "absent"}, "task: r is missing in adapter_config.json"),
        ({"r": 0}, "task: r is 0 in adapter_config.json"),
        ({"lora_alpha": "absent"}, "task: lora_alpha is missing"),
        ({"alpha_pattern": {"q_proj": "x"}}, "task: alpha_pattern is .*it must give modules numbers"),
        ({"rank_pattern": [1]}, "task: rank_pattern is .*it must give modules numbers"),
        ({"r": 8}, r"has A \[4, .*\] and B \[.*, 4\], but adapter_config.json gives it r 8"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj has A \[4, 32\] and B \[32, 4\], .* gives it r 2"),
        ({"base_model_name_or_path": "other"}, "base_model_name_or_path is other in .*task and .* in .*alignment"),
        ({"revision": "v2"}, "revision is v2 in .*task and None in .*alignment"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True in .*task and None in .*alignment"),
    ],
)
def test_what_no_pair_of_factors_says_is_refused(values, sentence, pair, tmp_path):
    change_config(pair[0], **values)
    with pytest.raises(UserError, match=sentence):
        run(*pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change_weights(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop(f"{Q}.lora_A.weight"), "task: model.layers.0.self_attn.q_proj has no lora_A"),
        (lambda w: w.pop(f"{Q}.lora_B.weight"), "task: model.layers.0.self_attn.q_proj has no lora_B"),
        (lambda w: w.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}), "lora_magnitude_vector .* is no A or B"),
        (lambda w: w.update({f"{Q}.lora_embedding_A": torch.ones(4, 97)}), "lora_embedding_A .* is no A or B"),
        (lambda w: w.update({f"{Q}.base_layer.bias": torch.ones(32)}), r"base_layer.bias \[32\] is no A or B"),
        (lambda w: w.update({f"{Q}.lora_A.weight": torch.ones(4, 32, 1)}), r"\[4, 32, 1\] is no A or B"),
        (lambda w: w[f"{Q}.lora_A.weight"].fill_(float("nan")), "lora_A.weight holds NaN or infinity"),
        (lambda w: w.clear(), "adapter_model.safetensors holds no tensors"),
        (lambda w: w.update({f"{Q}.lora_A.weight": torch.ones(4, 31)}), "is 32 x 31 in .*task and 32 x 32 in"),
    ],
)
def test_tensors_that_are_no_factors_are_refused(change, sentence, pair, tmp_path):
    change_weights(pair[0], change)
    with pytest.raises(UserError, match=sentence):
        run(*pair, tmp_path / "out")


def test_real_adapters_of_other_kinds_are_refused(llama, tmp_path, pair):
    """What peft itself saves for them, not what we think it does."""
    kinds = {
        "use_dora is set": {"use_dora": True, "target_modules": ["q_proj"]},
        "bias is 'lora_only'": {"bias": "lora_only", "target_modules": ["q_proj"]},
        "modules_to_save is set": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        "trainable_token_indices is set": {"trainable_token_indices": [3], "target_modules": ["q_proj"]},
        "base_model.model.model.embed_tokens.* is no A or B": {"target_modules": ["embed_tokens", "q_proj"]},
        "lora_bias is set": {"lora_bias": True, "target_modules": ["q_proj"]},
        "alora_invocation_tokens is set": {"alora_invocation_tokens": [3, 4], "target_modules": ["q_proj"]},
    }
    for number, (sentence, settings) in enumerate(kinds.items()):
        folder = make_adapter(llama, tmp_path / str(number), 1, **settings)
        with pytest.raises(UserError, match=f"alignment adapter {folder}: {sentence}"):
            run(pair[0], folder, tmp_path / "out")


def test_files_that_are_missing_or_cut_are_refused(pair, tmp_path):
    weights = pair[0] / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, 300, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"task adapter .*task cannot be read, is it whole"):
            run(*pair, tmp_path / "out")
    weights.unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors is missing"):
        run(*pair, tmp_path / "out")
    weights.write_bytes(whole)
    for text in ("{", "[]", "\x00"):
        (pair[0] / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=r"cannot be read|holds no object"):
            run(*pair, tmp_path / "out")
    (pair[0] / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"task adapter .*task holds no adapter_config.json: name an adapter"):
        run(*pair, tmp_path / "out")
    (pair[1] / "mlalign.json").write_text("{}")


def test_adapters_of_other_model_classes_are_refused(pair, tmp_path):
    def shorten(weights: dict) -> None:
        for key in list(weights):
            weights[key.replace("model.model.", "model.")] = weights.pop(key)

    change_weights(pair[1], shorten)
    with pytest.raises(UserError, match=r"task has modules in model.layers and .*alignment in layers"):
        run(*pair, tmp_path / "out")


def test_frozen_weights_that_peft_saves_must_agree(llama, tmp_path):
    """Where `lm_head` is a target, peft saves the model's own weight beside the factors."""
    task = make_adapter(llama, tmp_path / "task", 1, target_modules=["q_proj", "lm_head"])
    alignment = make_adapter(llama, tmp_path / "alignment", 2, target_modules=["q_proj", "lm_head"])
    key = "base_model.model.lm_head.base_layer.weight"
    change_weights(alignment, lambda weights: weights.update({key: weights[key].bfloat16()}))
    run(task, alignment, tmp_path / "out")
    frozen = load_file(tmp_path / "out/adapter_model.safetensors")[key]
    assert torch.equal(frozen.bfloat16(), load(llama).lm_head.weight.bfloat16())
    change_weights(alignment, lambda weights: weights[key].add_(1))
    with pytest.raises(UserError, match=r"lm_head has one weight in .*task and another in .*alignment"):
        run(task, alignment, tmp_path / "other")


def test_layers_of_two_lists_of_blocks_are_refused(pair, tmp_path):
    def copy_to_vision(weights: dict) -> None:
        for key in list(weights):
            weights[key.replace("model.layers", "vision.blocks")] = weights[key].clone()

    change_weights(pair[0], copy_to_vision)
    with pytest.raises(UserError, match=r"layers is ambiguous: .* in model.layers and in vision.blocks"):
        run(*pair, tmp_path / "out", layers=2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weight": 1.5}, "weight is 1.5, it must be a number from 0 to 1, or auto"),
        ({"weight": "-0.1"}, "weight is -0.1"),
        ({"weight": "nan"}, "weight is nan"),
        ({"weight": "half"}, "weight is half"),
        ({"weight": "auto"}, "weight auto needs dev"),
        ({"weight": "auto", "dev": ("x",)}, "weight auto needs a task"),
        (
            {"weight": "auto", "dev": ("x",), "task": "items", "grid": "0,2"},
            "grid is 2, it must be numbers from 0 to 1",
        ),
        ({"weight": "auto", "dev": ("x",), "task": "items", "grid": ""}, "grid is , it must be numbers"),
        ({"weight": "auto", "dev": ("x",), "task": "items", "grid": "0,0.0"}, "grid 0,0.0 must hold different numbers"),
        ({"weight": "auto", "dev": ("x",), "task": "items", "grid": "0,0.125"}, "of at most two decimals"),
        ({"dev": ("x",)}, "dev belongs to --weight auto, and the weight is 0.5"),
        ({"task": "slot_filling"}, "task belongs to --weight auto"),
        ({"max_rows": 3}, "max_rows belongs to --weight auto"),
        ({"method": "svd"}, "method svd is not one of linear, ties, dare_linear, dare_ties"),
        ({"density": 0.5}, "density belongs to ties, dare_linear, dare_ties, and the method is linear"),
        ({"method": "ties", "density": 0.0}, "density is 0.0, it must be above 0 and at most 1"),
        ({"method": "ties", "density": 1.1}, "density is 1.1"),
        ({"method": "ties", "density": float("nan")}, "density is nan"),
        ({"method": "ties", "seed": 1}, "seed belongs to dare_linear and dare_ties, and the method is ties"),
        ({"rank": 0}, "rank is 0, it must be 1 or more"),
        ({"rank": 17}, r"rank is 17, but model.layers.\d.self_attn.[kv]_proj has no rank above 16"),
        ({"layers": 0}, "layers is 0, it must be 1 or more"),
        ({"layers": 5}, "layers is 5, but .* has 4 decoder blocks"),
        ({"layers": 2, "model": "/nowhere"}, "layers cannot be checked, name the base model by --model: .*nowhere"),
    ],
)
def test_options_that_are_wrong_or_unused_are_refused(settings, sentence, pair, tmp_path):
    with pytest.raises(UserError, match=sentence):
        run(*pair, tmp_path / "out", **settings)
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_other_refusals(pair, tmp_path):
    (pair[0] / "mlalign.json").write_text('{"supervised": ["en"]}')
    with pytest.raises(UserError, match=r"task/mlalign.json must hold lists `supervised` and `aligned`"):
        run(*pair, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output .*file cannot be written"):
        run(*pair, tmp_path / "file")
    for folder in pair:
        change_config(folder, base_model_name_or_path=None)
    with pytest.raises(UserError, match=r"model is needed, and .*adapter_config.json names none: give --model"):
        run(*pair, tmp_path / "out", layers=2)


# -------------------------------------------------------------------------------------------------------------- auto


def test_the_curve_is_drawn(tmp_path):
    rng = np.random.default_rng(0)
    x = [step / 10 for step in range(11)]
    lines = {f"l{number:02}": list(rng.random(11)) for number in range(29)}
    plot_curve(x, list(np.mean(list(lines.values()), axis=0)), lines, 0.3, ("merge weight", "f1"), tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000


@torch.no_grad()
def greedy(lm, tokenizer, prompt: str, tokens: int) -> str:
    """The answer to a prompt, one token at a time."""
    ids = [1, *tokenizer.encode(prompt, add_special_tokens=False)]
    start = len(ids)
    while len(ids) < start + tokens and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def tuned(tiny_model, tokenizer, tmp_path_factory) -> dict:
    """Adapters, and dev rows whose answers are those of the two deltas added by hand at weight 0.6."""
    folder = tmp_path_factory.mktemp("tuned")
    task = make_adapter(str(tiny_model), folder / "task", 1, target_modules=EVERY)
    alignment = make_adapter(str(tiny_model), folder / "alignment", 2, target_modules=EVERY, layers_to_transform=[0, 1])
    of_task, of_alignment = deltas(str(tiny_model), task), deltas(str(tiny_model), alignment)
    lm = added(str(tiny_model), (0.4, of_task), (0.6, of_task | of_alignment))
    rows = []
    for number in range(24):
        prompt = f"{TEXT[number % 9]} {number} =>"
        answer = greedy(lm, tokenizer, prompt, 4)
        if answer:
            rows.append({"prompt": prompt, "completion": answer, "lang": ("en", "de", "ru")[number % 3]})
    assert len(rows) > 15
    return {"pair": (task, alignment), "dev": str(write_jsonl(folder / "dev.jsonl", rows))}


def auto(tuned: dict, output: str, **settings) -> dict:
    """`--weight auto`, small."""
    how = {"layers": 2, "task": "items", "grid": "1,0.6,0,0.3", "batch_size": 8, "max_new_tokens": 4} | settings
    return run(*tuned["pair"], Path(output), weight="auto", dev=(tuned["dev"],), **how)


def test_auto_finds_the_weight_whose_answers_are_right(tuned, tiny_model, tmp_path):
    with console.capture() as capture:
        result = auto(tuned, tmp_path / "out")
    tuning = result["tuning"]
    assert (tuning["metric"], tuning["weights"], tuning["best"]) == ("f1", [0.0, 0.3, 0.6, 1.0], 0.6)
    assert tuning["mean"][2] == 1 > max(tuning["mean"][0], tuning["mean"][1], tuning["mean"][3])
    assert set(tuning["languages"]) == {"en", "de", "ru"}
    assert "best weight 0.60, f1 1.000" in capture.get()
    assert result["settings"]["weight"] == 0.6
    assert (tmp_path / "out/weights.png").stat().st_size > 10_000
    run(*tuned["pair"], tmp_path / "alone", weight=0.6, layers=2)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    for place, weight in enumerate(tuning["weights"]):  # each point of the curve is an evaluation of its own
        [report] = evaluate(
            Evaluation(
                output=tmp_path / f"again-{weight}",
                task="items",
                model=str(tiny_model),
                test=(tuned["dev"],),
                adapters=(str(tmp_path / f"out/tuning/{weight:.2f}/adapter"),),
                max_new_tokens=4,
            )
        )
        scores = report["scores"]["f1"]
        assert {language: each[place] for language, each in tuning["languages"].items()} == scores
        assert tuning["mean"][place] == pytest.approx(sum(scores.values()) / 3)


def test_auto_goes_on_where_it_was_interrupted(tuned, tmp_path):
    first = auto(tuned, tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/tuning").rglob("adapter_model.safetensors")}
    (tmp_path / "out/adapter_config.json").unlink()
    (tmp_path / "out/tuning/0.30/adapter/adapter_config.json").unlink()  # as if stopped in writing it
    answers = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/tuning").rglob("predictions/*.jsonl")}
    assert auto(tuned, tmp_path / "out") == first
    again = {path: path.stat().st_mtime_ns for path in kept}
    assert {path.parent.parent.name for path in kept if kept[path] != again[path]} == {"0.30"}
    repeated = {path.parts[-4] for path, time in answers.items() if path.stat().st_mtime_ns != time}
    assert repeated == {"0.30"}
    other = auto(tuned, tmp_path / "out", layers=None)  # another recipe: every candidate and evaluation is made anew
    assert other["tuning"]["mean"] != first["tuning"]["mean"]


def test_equal_scores_take_the_smallest_weight(tuned, tmp_path):
    rows = [{"prompt": "play", "completion": "date: friday", "annot_utt": "play on [date : friday]", "lang": "en"}]
    dev = str(write_jsonl(tmp_path / "dev.jsonl", rows))
    with console.capture() as capture:
        result = auto(tuned | {"dev": dev}, tmp_path / "out", task="slot_filling")
    assert result["tuning"]["mean"] == [0.0] * 4
    assert result["tuning"]["best"] == 0.0
    assert "every weight has the same score" in capture.get()


def test_auto_on_two_ranks(tuned, tmp_path, ranks):
    found = ranks(2).run(auto, tuned, str(tmp_path / "two"))
    assert found[0] == found[1]
    one = auto(tuned, tmp_path / "one")
    assert found[0]["tuning"] == one["tuning"]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


def test_a_user_error_on_rank_0_ends_both_ranks(tuned, tmp_path, ranks):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").touch()
    with pytest.raises(
        AssertionError, match=r"is a model: choose a directory of its own|rank 0 failed, see its message"
    ):
        ranks(2).run(auto, tuned, str(tmp_path / "out"))
