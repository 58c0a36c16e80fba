"""adapter_config.json of a merged adapter, as peft wants it. Used by `mlalign merge`."""

from typing import Any

from peft import LoraConfig

from mlalign.merging import Adapter, Merged


def adapter_config(merged: Merged, task: Adapter, alignment: Adapter) -> dict[str, Any]:
    """adapter_config.json of the merged adapter: a plain LoRA whose alpha is its rank, so that its scaling is 1."""
    config = LoraConfig(
        r=merged.rank,
        lora_alpha=merged.rank,
        lora_dropout=task.config.get("lora_dropout", 0.0),
        fan_in_fan_out=task.config.get("fan_in_fan_out", False),
        target_modules=_target_modules(merged, task, alignment),
        base_model_name_or_path=task.config.get("base_model_name_or_path"),
        revision=task.config.get("revision"),
        task_type=task.config.get("task_type"),
        auto_mapping=task.config.get("auto_mapping"),
        inference_mode=True,
    )
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def _target_modules(merged: Merged, task: Adapter, alignment: Adapter) -> list[str]:
    """The inputs' own names where these say exactly the merged modules, else the modules' full names.

    An adapter whose list has no further condition holds every module of the model that the list names.
    """
    names: set[str] = set()
    for adapter in (task, alignment):
        listed = adapter.config.get("target_modules")
        limited = any(adapter.config.get(key) not in (None, []) for key in ("exclude_modules", "layers_to_transform"))
        if not isinstance(listed, list) or limited:
            return sorted(merged.factors)
        names |= set(listed)
    used = {name for name in names if any(_named(module, name) for module in merged.factors)}
    known = task.factors.keys() | alignment.factors.keys()
    said = {module for module in known if any(_named(module, name) for name in used)}
    return sorted(used if said == merged.factors.keys() else merged.factors)


def _named(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
