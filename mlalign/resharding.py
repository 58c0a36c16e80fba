"""What a run has trained, by parameter and place: any number of ranks and ZeRO stage reads what any other wrote.

    for tensors in parts(engine, copy): ...   this rank's share, 256 MiB at a time, in host memory
    restore(engine, folder, names, steps) from the files of all ranks, however many they were

DeepSpeed lays trainable parameters out flat and cuts that into one partition a rank; its checkpoints hold the
partitions, and fit the layout that wrote them. Here every piece of a parameter in a partition carries the parameter's
name and its place therein, and a rank reads from all files what its own pieces need: nothing is converted, or held
whole.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mlalign import distributed
from mlalign.errors import UserError

_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of what Adam keeps
_PART = 2**28  #: bytes


class _Piece(NamedTuple):
    """Elements `offset` to `offset + count` of a flattened parameter, which lie at `start` of an optimizer's tensor."""

    name: str
    offset: int
    master: torch.Tensor  #: fp32, what the optimizer updates
    start: int
    count: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of the piece, [count], in a tensor that is laid out as `master`."""
        return tensor.detach().view(-1)[self.start : self.start + self.count]


def _pieces(engine) -> list[_Piece]:
    """What this rank's optimizer holds of the trainable parameters; without ZeRO, all of them."""
    trainable = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    stage, wrapper = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        masters = {id(p): master for p, master in masters_without_zero(engine)}
        return [_Piece(name, 0, masters.get(id(p), p), 0, p.numel()) for name, p in trainable]
    if stage == 3:
        return [_piece_of_zero3(wrapper, name, p) for name, p in trainable]
    pieces = []
    for name, parameter in trainable:
        if (linked := parameter._hp_mapping) is not None:  # else all of it is in other ranks' partitions
            master = wrapper.single_partition_of_fp32_groups[linked.param_group_index]
            offset, place = linked.lp_fragment_address.start, linked.hp_fragment_address
            pieces.append(_Piece(name, offset, master, place.start, place.numel))
    return pieces


def masters_without_zero(engine) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """bf16 parameters and their fp32 masters under ZeRO-0; none in fp32, where a parameter is its own."""
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() > 0 or wrapper is engine.basic_optimizer:
        return []
    groups = zip(wrapper.fp16_groups, wrapper.fp32_groups)
    return [pair for parameters, masters in groups for pair in zip(parameters, masters)]


def _piece_of_zero3(wrapper, name: str, parameter: nn.Parameter) -> _Piece:
    """ZeRO-3 cuts every parameter by itself, into equal parts, of which the last ones are padded."""
    group, start, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
    offset = distributed.rank() * size
    count = min(max(parameter.ds_numel - offset, 0), size)
    return _Piece(name, offset, wrapper.fp32_partitioned_groups_flat[group], start, count)


def _share(piece: _Piece) -> _Piece:
    """Of a whole parameter, the part that this rank writes."""
    size = math.ceil(piece.count / distributed.world_size())
    start = min(distributed.rank() * size, piece.count)
    return piece._replace(offset=start, start=start, count=min(size, piece.count - start))


def _cut(piece: _Piece) -> Iterator[_Piece]:
    """A piece as several of at most a part's size; none of an empty one."""
    size = _PART // 4
    for at in range(0, piece.count, size):
        yield piece._replace(offset=piece.offset + at, start=piece.start + at, count=min(size, piece.count - at))


def parts(engine, copy: bool) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's share in host memory: masters and Adam's moments as `what/offset/name`, fp32 and flat.

    Together the ranks' shares are whole, each element once. Nothing here waits for another rank.
    Args: copy: also of what is in host memory already, so that a next step does not change it.
    """
    pieces = _pieces(engine)
    if engine.zero_optimization_stage() == 0:  # all ranks hold all
        pieces = [_share(piece) for piece in pieces]
    part, size = {}, 0
    for piece in (cut for whole in pieces for cut in _cut(whole)):
        held = {"master": piece.master, **engine.basic_optimizer.state.get(piece.master, {})}
        for what in ("master", *_MOMENTS):
            # Adam makes its moments with its first update
            values = piece.of(held[what]) if what in held else torch.zeros(piece.count)
            if size + values.nbytes > _PART and part:
                yield part
                part, size = {}, 0
            part[f"{what}/{piece.offset}/{piece.name}"] = values.to("cpu", copy=copy)
            size += values.nbytes
    yield part


def adam_steps(engine) -> int:
    """How often Adam has updated: its bias correction goes by it."""
    return max((int(state.get("step", 0)) for state in engine.basic_optimizer.state.values()), default=0)


def restore(engine, folder: Path, names: list[str], steps: int) -> None:
    """Put the trained parameters and their optimizer to what `parts` gave on all ranks. Called by all ranks.

    Args: names: of the safetensors of those parts, in `folder`; steps: `adam_steps` then.
    Raises UserError, on all ranks, where the files are of other parameters.
    """
    stage, wrapper, optimizer = engine.zero_optimization_stage(), engine.optimizer, engine.basic_optimizer
    if stage == 3:
        wrapper.checkpoint_event_prologue()
    pieces = _pieces(engine)
    for master in {id(piece.master): piece.master for piece in pieces}.values():
        optimizer.state[master] = {"step": _step_of(optimizer, master, steps)}
        optimizer.state[master] |= {key: torch.zeros_like(master, requires_grad=False) for key in _MOMENTS}
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.module.named_parameters() if p.requires_grad}
    try:
        with torch.no_grad():
            failure = _fill(optimizer, pieces, sizes, [folder / name for name in names])
    except (OSError, RuntimeError, SafetensorError) as error:
        failure = f"cannot be read: {error}"
    for sentence in filter(None, distributed.gather_objects(failure)):
        raise UserError(f"checkpoint {folder} {sentence}")

    if stage == 3:
        for group in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(group)
        wrapper.checkpoint_event_epilogue()
    elif stage > 0:
        wrapper.update_lp_params()
    for parameter, master in masters_without_zero(engine):
        parameter.data.copy_(master)


def _step_of(optimizer: torch.optim.Optimizer, master: torch.Tensor, steps: int) -> torch.Tensor | int:
    """The entry `step` as the optimizer itself would have it."""
    if not isinstance(optimizer, torch.optim.AdamW):  # DeepSpeedCPUAdam
        return steps
    return torch.tensor(float(steps), device=master.device if optimizer.defaults["fused"] else "cpu")


def _fill(
    optimizer: torch.optim.Optimizer, pieces: list[_Piece], sizes: dict[str, int], files: list[Path]
) -> str | None:
    """Copy into the pieces what the files hold of them. Returns what is wrong, where the files are not of these."""
    opened = [safe_open(file, framework="pt") for file in files]
    places: dict[tuple[str, str], list] = {}
    saved: dict[str, int] = {}
    for file in opened:
        for key in file.keys():
            what, offset, name = key.split("/", 2)
            values = file.get_slice(key)
            (count,) = values.get_shape()
            places.setdefault((what, name), []).append((int(offset), count, values))
            saved[name] = max(saved.get(name, 0), int(offset) + count)
    for name in sizes | saved:
        if sizes.get(name) != saved.get(name):
            here, there = sizes.get(name, 0), saved.get(name, 0)
            return f"is of another model: {name} has {here} elements in this one, and {there} in that"
    for piece in pieces:
        for what in ("master", *_MOMENTS):
            target = piece.of(piece.master if what == "master" else optimizer.state[piece.master][what])
            for offset, count, values in places[what, piece.name]:
                start, end = max(piece.offset, offset), min(piece.offset + piece.count, offset + count)
                if start < end:
                    target[start - piece.offset : end - piece.offset].copy_(values[start - offset : end - offset])
    return None
