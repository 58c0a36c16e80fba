"""The DeepSpeed file that a config names: ZeRO and communication keys, and nothing that the config itself governs.

So a batch size, a precision or a clipping value stands in exactly one place.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlalign.config import Config, flatten, suggest
from mlalign.errors import UserError

#: DeepSpeed keys that say how to shard and communicate; everything else belongs to `Config`.
_DEEPSPEED_KEYS = {
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
    "aio",
}
_GOVERNED = {
    "train_batch_size": "task.batch_size",
    "train_micro_batch_size_per_gpu": "task.micro_batch_size",
    "gradient_accumulation_steps": "task.batch_size and task.micro_batch_size",
    "gradient_clipping": "optimizer.clip",
    "fp16": "model.precision",
    "bf16": "model.precision",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
}


def stage(deepspeed: dict[str, Any]) -> int:
    """The ZeRO stage, 0 to 3, of what `read_deepspeed` returns."""
    return deepspeed["zero_optimization"]["stage"]


def read_deepspeed(name: str | None) -> dict[str, Any]:
    """The ZeRO and communication keys of a DeepSpeed JSON file; ZeRO-0 for None.

    A relative path is looked up from the working directory, then among the files shipped with mlalign.
    Raises UserError for a key that `Config` governs, an unknown key, or the value "auto".
    """
    if name is None:
        return {"zero_optimization": {"stage": 0}}
    package = Path(__file__).parent
    places = [Path(name), package.parent / name, package / name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        shipped = sorted(p.name for folder in (package.parent, package) for p in (folder / "ds_configs").glob("*.json"))
        raise UserError(f"deepspeed: {name} does not exist; shipped in ds_configs/: {', '.join(shipped)}")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"deepspeed: {path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"deepspeed: {path} must hold one JSON object")
    for key in values:
        if key in _GOVERNED:
            raise UserError(f"deepspeed: {path} sets {key}, which belongs into the config as {_GOVERNED[key]}")
        if key not in _DEEPSPEED_KEYS:
            raise UserError(
                f"deepspeed: {path} has the key {key}{suggest(key, _DEEPSPEED_KEYS)}; only "
                "ZeRO and communication keys belong there"
            )
    settings = values.get("zero_optimization")
    if not isinstance(settings, dict) or settings.get("stage") not in (0, 1, 2, 3):
        raise UserError(f"deepspeed: {path} must set zero_optimization.stage to 0, 1, 2 or 3")
    if settings.get("overlap_comm") and settings["stage"] < 2:
        raise UserError(f"deepspeed: {path} sets overlap_comm, which needs ZeRO stage 2 or 3 here")
    if settings.get("offload_optimizer") and settings["stage"] == 0:
        raise UserError(f"deepspeed: {path} offloads the optimizer, which needs ZeRO stage 1, 2 or 3")
    if settings.get("compute_grad_norm") is False:
        raise UserError(f"deepspeed: {path} sets compute_grad_norm to false, but clipping and the log need the norm")
    automatic = [key for key, value in flatten(values).items() if value == "auto"]
    if automatic:
        raise UserError(f'deepspeed: {path} sets {automatic[0]} to "auto": write the value, or leave the key out')
    _check_zero(settings, path)
    offload = settings.get("offload_optimizer") or {}
    elsewhere = {
        "offload_optimizer.device to nvme": offload.get("device") == "nvme",
        "offload_optimizer.ratio below 1": offload.get("ratio", 1) < 1,
        "offload_optimizer.super_offload": bool(offload.get("super_offload")),
        "zenflow": settings.get("zenflow") is not None,
    }
    for what, is_set in elsewhere.items():
        if is_set:
            raise UserError(
                f"deepspeed: {path} sets {what}, which keeps the optimizer where no checkpoint would find it"
            )
    return values


def offloads_optimizer(deepspeed: dict[str, Any]) -> bool:
    """Whether the ZeRO section of a DeepSpeed config puts the optimizer on the CPU or on disk."""
    return (deepspeed["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none"


def fit_section(section: dict[str, Any], sizes: Sequence[int], adapters: bool) -> dict[str, Any]:
    """The ZeRO section for training tensors of so many elements; what the section itself sets, it keeps.

    Gradients get a bucket that is no larger than all of them together: DeepSpeed's default, half a billion elements,
    would take 1 GB of a GPU in bf16 for adapters of 40 MB.
    ZeRO-3 shards no adapter, nor weights that are smaller. Together they are small. Sharded, those above DeepSpeed's
    default of 100,000 elements would be gathered like large weights; with checkpointing also one by one, in every
    block's backward. Parameters on NVMe, whose buffers are few, are left as they are.
    """
    bucket = {"reduce_bucket_size": min(500_000_000, sum(sizes))} if section["stage"] > 0 else {}
    names = {"stage3_param_persistence_threshold", "param_persistence_threshold"}
    on_nvme = (section.get("offload_param") or {}).get("device") == "nvme"
    if adapters and section["stage"] == 3 and not names & section.keys() and not on_nvme:
        return bucket | {"stage3_param_persistence_threshold": max(100_000, *sizes)} | section
    return bucket | section


def saves_in_background(config: Config, cuda: bool, offloads_optimizer: bool) -> bool:
    """`async_checkpoint`, decided: where the optimizer is offloaded, host memory holds it all already."""
    return cuda and not offloads_optimizer if config.async_checkpoint == "auto" else config.async_checkpoint


def _check_zero(settings: dict[str, Any], path: Path) -> None:
    """DeepSpeed's own check of the ZeRO section, before the weights are loaded and not after."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # here: it takes a second

    try:
        DeepSpeedZeroConfig(**settings)
    except ValidationError as error:
        item = error.errors()[0]
        key = ".".join(str(part) for part in ("zero_optimization", *item["loc"]))
        close = suggest(str(item["loc"][-1]), set(DeepSpeedZeroConfig.model_fields))
        raise UserError(f"deepspeed: {path}: {key}: {item['msg'].lower()}{close}") from error
