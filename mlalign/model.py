"""The model: any Hugging Face decoder-only LM, adapters, and the truncated forward.

`AlignedModel` is what the engine wraps, see `sharding`. One call of it is one forward pass of one objective; an
alignment pass runs the first k decoder blocks and nothing else.
"""

import copy
import math
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from mlalign import distributed, head, traits, varlen
from mlalign.config import Config, Lora, Model
from mlalign.errors import UserError
from mlalign.loss import token_nll
from mlalign.pooling import POOLERS
from mlalign.tracker import say

_FROZEN = ".base_layer."  #: in peft's names of weights that an adapter leaves as they are
_NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


# ---------------------------------------------------------------------------------------------------------- loading


def load_tokenizer(settings: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises UserError where there is none."""
    _refuse_missing(settings.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.path, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"model.path {settings.path}: no tokenizer could be loaded: {_first_line(error)}") from error
    if not set(tokenizer.encode("a", add_special_tokens=False)) - set(tokenizer.all_special_ids):
        # Where the files are missing, transformers makes an empty tokenizer for some architectures.
        raise UserError(f"model.path {settings.path}: no tokenizer could be loaded: it has no vocabulary")
    return tokenizer


def load_model_config(settings: Model):
    """The model's transformers config, without its weights. Raises UserError where there is none."""
    _refuse_missing(settings.path)
    try:
        return AutoConfig.from_pretrained(settings.path, trust_remote_code=settings.trust_remote_code)
    except Exception as error:
        raise UserError(f"model.path {settings.path}: no model could be loaded: {_first_line(error)}") from error


def _refuse_missing(path: str) -> None:
    """What looks like a path would be taken for a hub id by transformers, and its sentence would be about that."""
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise UserError(f"model.path {path} is not a directory: name a model's directory, or a hub id")


def precision_dtype(precision: str) -> torch.dtype:
    """auto = bf16 on CUDA, else fp32."""
    if precision == "auto":
        precision = "bf16" if distributed.uses_cuda() else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def attention_name(attention: str, dtype: torch.dtype) -> str | None:
    """auto = flash attention where installed, on CUDA and in bf16; else None: sdpa, or eager where there is none."""
    if attention != "auto":
        return attention
    flash = distributed.uses_cuda() and dtype == torch.bfloat16 and is_flash_attn_2_available()
    return "flash_attention_2" if flash else None


def load_lm(settings: Model, deepspeed_config: dict[str, Any] | None = None) -> PreTrainedModel:
    """The pretrained model. Under ZeRO-3 every rank keeps its shard only; rank 0 reads the files, mapped into memory.

    Args: deepspeed_config: the engine's config while training, None elsewhere.
    """
    disable_progress_bar()
    if distributed.uses_cuda():
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new shape of a batch, most are new
    dtype = precision_dtype(settings.precision)
    attention = attention_name(settings.attention, dtype)
    with _sharded_loading(deepspeed_config):
        try:
            try:
                lm = _from_pretrained(settings, dtype, attention)
            except Exception:
                if settings.attention != "auto" or attention is None:
                    raise
                lm = _from_pretrained(settings, dtype, None)  # a model without flash attention
        except Exception as error:
            raise UserError(f"model.path {settings.path}: no model could be loaded: {_first_line(error)}") from error
    if settings.gradient_checkpointing:
        # Reentrant checkpointing fails where a block runs twice in one backward, as with two passes over a pair.
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm


def _from_pretrained(settings: Model, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        settings.path,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=settings.trust_remote_code,
        use_safetensors=True,  # a pickle may run anything
    )


@contextmanager
def _sharded_loading(deepspeed_config: dict[str, Any] | None) -> Iterator[None]:
    """While this object lives, transformers shards every model it builds; so it must not outlive the loading."""
    stage = (deepspeed_config or {}).get("zero_optimization", {}).get("stage")
    keeper = HfDeepSpeedConfig(deepspeed_config) if stage == 3 else None
    try:
        yield
    finally:
        del keeper


def add_lora(lm: PreTrainedModel, lora: Lora) -> PeftModel:
    """Freeze the model and add LoRA adapters. Raises UserError where no module has one of the names."""
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(lm, settings, autocast_adapter_dtype=False)
    except (ValueError, re.error) as error:
        raise UserError(f"lora.target_modules {lora.target_modules}: {_first_line(error)}") from error


def load_for_inference(
    settings: Model, adapter: str | None = None, deepspeed_config: dict[str, Any] | None = None
) -> nn.Module:
    """A model in eval mode on this rank's device, with an adapter where one is given.

    In fp32 the adapter is merged into the weights; in bf16 it stays beside them, for their sum would be rounded to a
    model that was never trained. So does one of an LM head that shares its weight with the embeddings: merging would
    change these too.
    Args: deepspeed_config: for ZeRO-3, where the model is not moved and the adapter stays beside its shards too.
    Raises UserError for an adapter that does not fit the model to the last tensor.
    """
    lm = load_lm(settings, deepspeed_config)
    if adapter is not None:
        lm = _with_adapter(lm, adapter, settings.path)
        mergeable = not deepspeed_config and precision_dtype(settings.precision) == torch.float32
        if mergeable and not _changes_tied_weight(lm):
            lm = lm.merge_and_unload()
    return (lm if deepspeed_config else lm.to(distributed.device())).eval()


def adapter_folder(path: str) -> str:
    """An adapter's directory: the one that is named, or `adapter` in a run directory; a hub id is left as it is."""
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return str(folder)
    if Path(path).is_dir() or path.startswith(("/", ".")):
        raise UserError(f"adapter {path} holds no adapter_config.json: name an adapter's directory or a run")
    return path


def _with_adapter(lm: PreTrainedModel, adapter: str, model: str) -> PeftModel:
    try:
        trained_on = PeftConfig.from_pretrained(adapter).base_model_name_or_path
        safe = adapter_file(adapter, "adapter_model.safetensors")
        saved = load_peft_weights(adapter, device="cpu") if safe else {}
    except Exception as error:  # of peft, safetensors, json
        raise UserError(f"adapter {adapter} cannot be loaded: {_first_line(error)}") from error
    if not safe:
        raise UserError(f"adapter {adapter} has no adapter_model.safetensors: pickled weights are not loaded")
    try:
        lm = PeftModel.from_pretrained(lm, adapter, torch_device="cpu")  # peft's own choice is every host's first GPU
    except Exception as error:
        raise UserError(
            f"adapter {adapter} does not fit {model}, it was trained on {trained_on}: {_last_line(error)}"
        ) from error
    # peft only warns of tensors that have no place in the model, or of places that got none; the frozen weight of an LM
    # head that is a target may be in the file or not
    placed = {name for name in get_peft_model_state_dict(lm) if _FROZEN not in name}
    strange = {name for name in saved if _FROZEN not in name} ^ placed
    if strange:
        raise UserError(
            f"adapter {adapter} does not fit {model}, it was trained on {trained_on}: {len(strange)} tensors have no "
            f"counterpart, such as {min(strange)}"
        )
    if trained_on and trained_on.rstrip("/") != model.rstrip("/"):
        say(f"adapter {adapter} was trained on {trained_on}; here it is put on {model}")
    return lm


def adapter_file(adapter: str, name: str) -> Path | None:
    """A file of an adapter, in its directory or fetched from the hub; None where it has no such file."""
    if Path(adapter).is_dir():
        return Path(adapter) / name if (Path(adapter) / name).is_file() else None
    try:
        return Path(hf_hub_download(adapter, name))
    except LocalEntryNotFoundError:  # one of the following too, and only says that this host is offline
        raise
    except EntryNotFoundError:
        return None


def _changes_tied_weight(lm: PeftModel) -> bool:
    """Whether a LoRA delta lies on a weight that input embeddings and LM head share."""
    ends = lm.get_input_embeddings(), lm.get_output_embeddings()
    first, second = (getattr(getattr(end, "base_layer", end), "weight", None) for end in ends)
    return first is not None and first is second and any(hasattr(end, "base_layer") for end in ends)


# ------------------------------------------------------------------------------------------------- truncated forward


def vocabulary(lm: nn.Module) -> float:
    """The number of tokens that a causal LM has embeddings for; infinite where it does not say."""
    embeddings = lm.get_input_embeddings()
    return getattr(getattr(embeddings, "base_layer", embeddings), "num_embeddings", math.inf)


def without_adapter(lm: nn.Module) -> PreTrainedModel:
    """The model that an adapter was put around; a model without one as it is."""
    return lm.get_base_model() if isinstance(lm, PeftModel) else lm


def decoder_parts(lm: nn.Module) -> tuple[nn.Module, str, str]:
    """The decoder of a causal LM (below its LM head), and the names of its block list and its final norm in it.

    Raises UserError for an architecture that is laid out otherwise.
    """
    base = without_adapter(lm)
    decoder = base.get_decoder()
    depth = base.config.get_text_config().num_hidden_layers
    stacks = [n for n, m in decoder.named_children() if isinstance(m, nn.ModuleList) and len(m) == depth]
    norms = [name for name, _ in decoder.named_children() if name in _NORM_NAMES]
    if len(stacks) != 1 or len(norms) != 1:
        raise UserError(
            f"{type(base).__name__} is not supported: its decoder has {len(stacks)} lists of {depth} blocks and "
            f"{len(norms)} final norms, where one of each is needed"
        )
    return decoder, stacks[0], norms[0]


def truncated_decoder(lm: nn.Module, layer: int) -> nn.Module:
    """The decoder's first `layer` blocks, without the final norm, as a view that shares every parameter.

    `view(input_ids=..., attention_mask=..., use_cache=False).last_hidden_state` equals `hidden_states[layer]` of the
    whole model, for layer < depth (the last of `hidden_states` is behind the final norm, the view is before it). The
    whole model is untouched. Make the view after adapters are added and before `deepspeed.initialize`, and keep it
    out of the module tree, or its parameters count twice.
    """
    decoder, stack, norm = decoder_parts(lm)
    view = copy.copy(decoder)
    view.__dict__ = dict(decoder.__dict__)
    view._modules = dict(decoder._modules)
    view._modules[stack] = nn.ModuleList(decoder._modules[stack][:layer])
    view._modules[norm] = nn.Identity()
    for name, value in vars(view).items():
        if name.endswith("_hooks") and isinstance(value, OrderedDict):
            vars(view)[name] = OrderedDict()  # the copied dicts are the decoder's own: hooks on one would run in both
    return view


def resolve_layer(layer: int | str, depth: int) -> int:
    """auto = half the depth. Raises UserError for a layer that the model does not have."""
    if layer == "auto":
        return max(depth // 2, 1)
    if not 1 <= layer <= depth:
        raise UserError(f"alignment.layer is {layer}, but the model has layers 1 to {depth}")
    return layer


def checked_layer(config: Config) -> int:
    """The alignment layer, the whole depth where nothing is aligned; from the model's config, without its weights.

    Raises UserError for a layer that the model does not have, and for rows longer than its positions.
    """
    settings = load_model_config(config.model).get_text_config()
    positions = getattr(settings, "max_position_embeddings", None) or math.inf
    for name, section in (("task", config.task), ("alignment", config.alignment)):
        if section is not None and section.max_length > positions:
            raise UserError(f"{name}.max_length is {section.max_length}, but the model has {positions} positions")
    depth = settings.num_hidden_layers
    return resolve_layer(config.alignment.layer, depth) if config.alignment else depth


class AlignedModel(nn.Module):
    """A causal LM and the truncated view of it, behind the single forward that the engine needs."""

    def __init__(self, lm: nn.Module, layer: int, pooling: str) -> None:
        super().__init__()
        self.lm = lm
        self.layer = layer
        self._pool = POOLERS[pooling]
        self._view = [truncated_decoder(lm, layer)]  # in a list, so that it is not registered as a submodule
        self._decoder = [decoder_parts(lm)[0]]
        self.flash = "flash" in (self._decoder[0].config._attn_implementation or "")  #: told of packed rows' edges
        self.fused = False  #: whether the loss comes out of the LM head
        self.chosen = False  #: whether, where it does not, the model gives the logits of learned tokens alone
        self.masked = True  #: whether attention is told of padding

    def forward(
        self, task: dict[str, torch.Tensor] | None = None, bitext: list[dict[str, torch.Tensor]] | None = None
    ) -> torch.Tensor:
        """One pass of one objective.

        Args: task: `collate.collate_task`; or bitext: `collate.collate_bitext`.
        Returns: the sum of token NLL (a scalar), or embeddings [2, pairs, hidden], src first, fp32.
        """
        if task is not None:
            return self._task_nll(task)
        return self._pooled(bitext)

    def ask(self) -> None:
        """Find out what passes may leave out: logits of all tokens, and masks of padding. All ranks call it."""
        plain = not distributed.any_rank(not traits.is_plain(self.lm, self._decoder[0]))
        self.fused = plain and head.fuse_head(self.lm)
        self.chosen = not self.fused and not distributed.any_rank(not traits.chooses_logits(self.lm))
        # In fp32 on CUDA, sdpa has a fast kernel for grouped heads only with a mask, and only after copying them.
        fast = not distributed.uses_cuda() or self.lm.dtype == torch.bfloat16
        self.masked = not distributed.broadcast_object(fast and traits.is_causal(self._decoder[0]))

    def attend_by(self, attention: str) -> None:
        """Attend by another attention of transformers, or by that of `varlen`, from now on."""
        if attention != self._decoder[0].config._attn_implementation:
            self.lm.set_attn_implementation(attention)
        self.flash = "flash" in attention or attention == varlen.NAME

    def _task_nll(self, task: dict[str, torch.Tensor]) -> torch.Tensor:
        arguments = self._arguments(task)
        if not self.fused:
            if self.chosen:
                arguments["logits_to_keep"] = _is_among(task["positions"], task["input_ids"].shape)
                return token_nll(self.lm(**arguments).logits, task["targets"])
            logits = self.lm(**arguments).logits
            return token_nll(logits.flatten(0, 1)[task["positions"]], task["targets"])
        states = self._decoder[0](**arguments).last_hidden_state
        learned = states.flatten(0, 1)[task["positions"]]
        return self.lm.get_output_embeddings()(learned, targets=task["targets"])

    def _pooled(self, passes: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        states = [self._view[0](**self._arguments(inputs)).last_hidden_state for inputs in passes]
        rows = [self._pool(_by_row(each, inputs), inputs["attention_mask"]) for each, inputs in zip(states, passes)]
        order = torch.cat([inputs["rows"] for inputs in passes]).argsort()
        return torch.cat(rows).index_select(0, order).view(2, -1, rows[0].shape[-1])

    def _arguments(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What a decoder is called with; inputs: see `collate.collate_ids`."""
        if "slots" not in inputs:
            names = ("input_ids", "attention_mask") if self.masked else ("input_ids",)
            return {name: inputs[name] for name in names} | {"use_cache": False}
        arguments = {name: inputs[name] for name in ("input_ids", "position_ids")} | {"use_cache": False}
        if self.flash:  # or it would look for the rows' edges in every block, and wait for the GPU
            mask = inputs["attention_mask"]
            edges = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
            arguments |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
            arguments |= {"max_length_q": mask.shape[1], "max_length_k": mask.shape[1]}
        return arguments

    def train(self, mode: bool = True) -> "AlignedModel":
        super().train(mode)
        self._view[0].training = mode  # the view is no submodule: its blocks follow the mode, its own flag does not
        return self

    def above(self) -> list[nn.Parameter]:
        """Trainable parameters that an alignment pass never reaches: blocks above the layer, final norm, LM head."""
        reached = {id(parameter) for parameter in self._view[0].parameters()}
        return [p for p in self.lm.parameters() if p.requires_grad and id(p) not in reached]

    def reached(self) -> dict[int, list[nn.Parameter]]:
        """Trainable parameters that an alignment pass reaches, by layer; 0 = what precedes the blocks."""
        _, stack, _ = decoder_parts(self.lm)
        blocks = dict(enumerate(getattr(self._view[0], stack), 1))
        layers = {layer: [p for p in block.parameters() if p.requires_grad] for layer, block in blocks.items()}
        inside = {id(p) for parameters in layers.values() for p in parameters}
        before = [p for p in self._view[0].parameters() if p.requires_grad and id(p) not in inside]
        return {layer: parameters for layer, parameters in ({0: before} | layers).items() if parameters}


def _is_among(positions: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Ascending positions in flattened rows as a mask of rows, bool [rows, width]."""
    mask = torch.zeros(shape, dtype=torch.bool, device=positions.device)
    mask.view(-1)[positions] = True
    return mask


def _by_row(states: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """States of packed rows as those of padded ones, [rows, width, hidden]; padded ones as they are."""
    if "slots" not in inputs:
        return states
    mask = inputs["attention_mask"]
    padded = states.new_zeros(mask.numel(), states.shape[-1]).index_copy(0, inputs["slots"], states[0])
    return padded.view(*mask.shape, -1)


def _first_line(error: Exception) -> str:
    if "contains custom code" in str(error):
        return "it brings Python code of its own: look at it, then set trust_remote_code"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
