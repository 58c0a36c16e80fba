"""The truncated forward on many architectures, and what it must leave alone."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mlalign import compiling, pooling, sharding
from mlalign import model as model_module
from mlalign.compiling import check_compile
from mlalign.config import Config, Lora, Model
from mlalign.errors import UserError
from mlalign.model import AlignedModel, add_lora, load_lm, resolve_layer, truncated_decoder

_LLAMA_LIKE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT_LIKE = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ARCHITECTURES = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE | {"sliding_window": 4},
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE | {"head_dim": 8},
    "gemma2": _LLAMA_LIKE | {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": _LLAMA_LIKE | {"head_dim": 8, "sliding_window": 4},
    "phi3": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "gpt2": _GPT_LIKE
    | {
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gpt_neox": _GPT_LIKE
    | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "falcon": _GPT_LIKE | {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
    "bloom": _GPT_LIKE | {"hidden_size": 32, "n_layer": 4, "n_head": 4},
}


def build(architecture: str):
    torch.manual_seed(0)
    attention = "eager" if architecture in ("gemma2", "bloom") else "sdpa"  # which these do not have
    settings = CONFIG_MAPPING[architecture](**ARCHITECTURES[architecture])
    return AutoModelForCausalLM.from_config(settings, attn_implementation=attention)


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7])
    return {"input_ids": ids, "attention_mask": mask}


def passes(*each: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """As `collate.collate_bitext` makes them, rows in order."""
    numbers = torch.arange(sum(len(one["input_ids"]) for one in each)).split([len(one["input_ids"]) for one in each])
    return [one | {"rows": rows} for one, rows in zip(each, numbers)]


@pytest.mark.parametrize("flash", [True, False])
def test_a_model_without_weights_is_one_sentence(tmp_path, tiny_model, monkeypatch, flash):
    """Where flash attention is installed too, and a second try without it is made."""
    for path in tiny_model.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr("mlalign.model.attention_name", lambda *_: "flash_attention_2" if flash else None)
    with pytest.raises(UserError, match=rf"model\.path {tmp_path}: no model could be loaded: "):
        load_lm(Model(path=str(tmp_path)))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_truncated_forward_is_the_hidden_state(architecture, adapters, checkpointing):
    lm = build(architecture)
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    if adapters:
        lm = add_lora(lm, Lora(dropout=0.0))
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)  # at its zero start an adapter changes nothing
    lm.train(checkpointing)
    for layer in (0, 1, 2, 3):
        view = truncated_decoder(lm, layer)
        found = view(**inputs(), use_cache=False).last_hidden_state
        wanted = lm(**inputs(), output_hidden_states=True, use_cache=False).hidden_states[layer]
        assert torch.equal(found, wanted), layer


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_alignment_pass_reaches_the_lower_layers_and_no_other(architecture, adapters):
    lm = build(architecture)
    if adapters:
        lm = add_lora(lm, Lora(dropout=0.0))
    aligned = AlignedModel(lm, layer=2, pooling="mean")
    names = [name for name, _ in aligned.named_parameters()]
    assert len(names) == len(set(names)) == len(list(lm.named_parameters())), "the view must not be registered"
    aligned(bitext=passes(inputs(), inputs())).sum().backward()
    above = {id(p) for p in aligned.above()}
    assert above
    for name, parameter in aligned.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad is None) == (id(parameter) in above), name


def test_whole_model_is_untouched_by_the_view():
    lm = build("llama")
    before = lm(**inputs()).logits
    AlignedModel(lm, layer=1, pooling="mean")(bitext=passes(inputs(), inputs()))
    assert torch.equal(lm(**inputs()).logits, before)
    assert len(lm.model.layers) == 4


def test_dropout_of_the_view_follows_train_and_eval():
    lm = add_lora(build("llama"), Lora(dropout=0.5))
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    aligned = AlignedModel(lm, layer=2, pooling="mean")
    aligned.train()
    assert not torch.equal(aligned(bitext=passes(inputs(), inputs())), aligned(bitext=passes(inputs(), inputs())))
    aligned.eval()
    assert torch.equal(aligned(bitext=passes(inputs(), inputs())), aligned(bitext=passes(inputs(), inputs())))


def test_one_pass_and_two_passes_give_the_same_embeddings():
    aligned = AlignedModel(build("llama"), layer=2, pooling="last").eval()
    both = {name: torch.cat([value, value.flip(0)]) for name, value in inputs().items()}
    flipped = {name: value.flip(0) for name, value in inputs().items()}
    torch.testing.assert_close(aligned(bitext=passes(both)), aligned(bitext=passes(inputs(), flipped)))


def test_pooling_ignores_padding_on_either_side():
    states = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    assert torch.equal(pooling.mean(states, mask), torch.stack([states[0, :2].mean(0), states[1, 1:].mean(0)]))
    assert torch.equal(pooling.last(states, mask), torch.stack([states[0, 1], states[1, 3]]))


@pytest.mark.parametrize("architecture", ["gemma2", "qwen2", "gpt2", "llama"])
def test_weights_without_a_tokenizer_are_one_sentence(tmp_path, architecture):
    build(architecture).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        model_module.load_tokenizer(Model(path=str(tmp_path)))


def test_layer_auto_is_half_the_depth_and_others_are_checked():
    assert resolve_layer("auto", 32) == 16
    assert resolve_layer(4, 4) == 4
    with pytest.raises(UserError, match=r"alignment.layer is 5, but the model has layers 1 to 4"):
        resolve_layer(5, 4)


@pytest.mark.parametrize(("architecture", "wanted"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_attention_auto_is_what_the_model_has_without_cuda(tmp_path, architecture, wanted):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    build(architecture).save_pretrained(tmp_path)
    assert model_module.load_lm(Model(path=str(tmp_path))).config._attn_implementation == wanted
    assert model_module.attention_name("eager", torch.float32) == "eager"


def watch_gathers(values: dict) -> dict[str, int]:
    """Under ZeRO-3: how often parameters were found gathered in any block's hook, forward and backward."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from mlalign.collate import collate_bitext
    from mlalign.commands import train
    from mlalign.dataset import load_dataset

    config = Config.model_validate(values)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 10**8}
    engine = train._make_engine(config, sharding.engine_config(config, {"zero_optimization": zero}), layer=2)
    pairs = load_dataset(config, model_module.load_tokenizer(config.model)).orders["alignment"].take(4)
    lm = engine.module.lm
    base = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    upper = [*base.model.layers[2].parameters(), *base.model.layers[3].parameters(), base.lm_head.weight]
    lower = [p for block in base.model.layers[:2] for p in block.parameters()]
    seen = {"lower": 0, "upper": 0}

    def look(*_):
        for name, parameters in (("lower", lower), ("upper", upper)):
            seen[name] += sum(p.ds_status != ZeroParamStatus.NOT_AVAILABLE for p in parameters)

    for module in lm.modules():
        module.register_forward_hook(look)
        if any(True for _ in module.parameters(recurse=False)):
            module.register_full_backward_hook(look)
    engine.train()
    for _ in range(3):  # the third pass is one that the prefetcher has learned
        embeddings = engine(bitext=collate_bitext(pairs, 0, [len(pairs)] * 2))
        engine.backward(embeddings.square().sum())
        engine.step()
    engine.destroy()
    return seen


@pytest.mark.parametrize("adapters", ["lora", "full"])
def test_zero3_gathers_no_upper_layer_in_an_alignment_pass(ranks, settings, adapters):
    if adapters == "full":
        settings["lora"] = None
    seen = ranks(2).run(watch_gathers, settings)[0]
    assert seen["lower"] > 0
    assert seen["upper"] == 0


def shard_sizes(values: dict) -> tuple[int, int]:
    """Under ZeRO-3, before the engine exists: elements this rank holds, and elements of the whole model."""
    config = Config.model_validate(values)
    engine_config = sharding.engine_config(config, {"zero_optimization": {"stage": 3}})
    lm = model_module.load_lm(config.model, engine_config)
    parameters = list(lm.parameters())
    return sum(p.ds_tensor.numel() for p in parameters), sum(p.ds_numel for p in parameters)


def test_zero3_loads_a_shard_per_rank(ranks, settings):
    for held, whole in ranks(2).run(shard_sizes, settings):
        assert held < 0.6 * whole


def test_a_model_without_tokenizer_or_weights_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        model_module.load_tokenizer(Model(path=str(tmp_path)))
    with pytest.raises(UserError, match="no model could be loaded"):
        model_module.load_model_config(Model(path=str(tmp_path)))


def test_compiling_without_a_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"model\.compile needs no-such-compiler, which is not there"):
        check_compile({"zero_optimization": {"stage": 0}})


@pytest.mark.parametrize(("named", "missing"), [(None, "gcc or clang"), ("no-such-compiler", "no-such-compiler")])
def test_triton_without_a_compiler_is_one_sentence(monkeypatch, tmp_path, named, missing):
    monkeypatch.setattr(compiling.distributed, "uses_cuda", lambda: True)
    monkeypatch.setattr(compiling, "has_triton", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    check_compile({"zero_optimization": {"stage": 0}})
    if named:
        monkeypatch.setenv("CC", named)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=rf"model\.compile needs {missing}, which is not there"):
        check_compile({"zero_optimization": {"stage": 0}})


class Evil:
    """Pickled, it leaves a file behind where it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_pickled_weights_are_not_loaded(tmp_path, tiny_model):
    folder, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Evil(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="no model could be loaded"):
        model_module.load_lm(Model(path=str(folder)))
    adapter = tmp_path / "adapter"
    add_lora(build("llama"), Lora()).save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"weight": Evil(trace)}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled weights are not loaded"):
        model_module.load_for_inference(Model(path=str(tiny_model)), str(adapter))
    assert not trace.exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("with_frozen", [True, False], ids=["frozen weight in the file", "not in the file"])
def test_an_adapter_of_the_lm_head_leaves_tied_embeddings_alone(tied, with_frozen, tmp_path):
    """Merged into the weights, it would change the embeddings too, which it was not trained with."""
    config = CONFIG_MAPPING["llama"](**_LLAMA_LIKE, tie_word_embeddings=tied)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base")
    lm = add_lora(base, Lora(dropout=0.0, target_modules=["q_proj", "lm_head"]))
    for name, weight in lm.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    lm.save_pretrained(tmp_path / "adapter", save_embedding_layers=with_frozen)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = lm.eval()(input_ids=ids).logits
        found = model_module.load_for_inference(
            Model(path=str(tmp_path / "base"), precision="fp32"), str(tmp_path / "adapter")
        )
        torch.testing.assert_close(found(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.get_input_embeddings().weight, base.get_input_embeddings().weight)
