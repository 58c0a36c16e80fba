"""What a training step takes on one rank, by part: model states as ZeRO shards them, activations, buffers.

    model_states(layout)         what is held all the time, on the device and on the host
    phases(layout, passes)       phase of a step -> part -> bytes on the device
    checkpoint_size(layout)      what a checkpoint takes on disk

Pure numbers. Model states are those of ZeRO (Rajbhandari et al. 2020, section 3); what DeepSpeed 0.19 allocates around
them is cited by its file below deepspeed/runtime/. `activations` finds out what the passes take. Sizes are bytes of
one rank, counts of parameters are elements. Used by `mlalign plan`.
"""

from dataclasses import dataclass
from math import ceil

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")

#: Bytes that the name and place of a tensor take in a checkpoint, and its moments'. Measured.
_BYTES_PER_RECORD = 3 * 115
#: Bytes that each rank adds to a checkpoint: the state of its random generator, mostly. Measured on CPUs.
_BYTES_PER_RANK = 5_600


@dataclass(frozen=True)
class Pass:
    """Bytes of one forward and backward pass on one rank, above parameters and the gradients of earlier passes."""

    saved: int  #: alive between forward and backward: what autograd keeps, and the loss
    peak: int  #: the largest sum, each parameter's gradient gone as soon as it is made
    logits: int  #: the part of `peak` that has one entry per word of the vocabulary
    peak_with_gradients: int  #: the largest sum if gradients stay


@dataclass(frozen=True)
class Layout:
    """How DeepSpeed holds a model on each of some ranks."""

    zero: DeepSpeedZeroConfig
    ranks: int
    width: int  #: bytes of a parameter: 2 in bf16, 4 in fp32
    groups: tuple[tuple[int, ...], ...]  #: elements of each trainable tensor, by optimizer group
    frozen: tuple[int, ...]  #: elements of each other tensor
    cuda: bool

    @property
    def stage(self) -> int:
        return int(self.zero.stage)

    @property
    def trainable(self) -> int:
        """Elements of all trainable tensors."""
        return sum(map(sum, self.groups))

    @property
    def tensors(self) -> list[int]:
        """Elements of every tensor."""
        return [*self.frozen, *(size for group in self.groups for size in group)]

    @property
    def largest(self) -> int:
        """Elements of the largest trainable tensor."""
        return max(map(max, self.groups))

    @property
    def offloads_optimizer(self) -> bool:
        return _offloads(self.zero.offload_optimizer)

    @property
    def offloads_parameters(self) -> bool:
        return _offloads(self.zero.offload_param)

    def partitions(self) -> list[int]:
        """Elements of each optimizer group that one rank updates, padding included.

        ZeRO-1 and 2 cut a group's flat buffer, a multiple of 2 x ranks long; ZeRO-3 cuts every tensor.
        """
        if self.stage == 0:
            return [sum(group) for group in self.groups]
        if self.stage == 3:
            return [sum(ceil(size / self.ranks) for size in group) for group in self.groups]
        return [2 * ceil(sum(group) / (2 * self.ranks)) for group in self.groups]

    def touched(self) -> int:
        """Elements of the trainable tensors that lie in one rank's partition of ZeRO-1 and 2, wholly or in part.

        Their gradients are kept whole (zero/stage_1_and_2.py, copy_grads_in_partition). The most that any rank has.
        """
        of_rank = [0] * self.ranks
        for group, partition in zip(self.groups, self.partitions()):
            start = 0
            for size in group:
                for rank in range(start // partition, (start + size - 1) // partition + 1):
                    of_rank[rank] += size
                start += size
        return max(of_rank)

    def persistent(self) -> int:
        """Elements that ZeRO-3 keeps whole on every rank, because their tensors are small."""
        small = sum(size for size in self.tensors if size <= self.zero.param_persistence_threshold)
        return min(small, int(self.zero.model_persistence_threshold))

    def bucket(self) -> int:
        """Bytes of a reduce bucket that take memory: on a CPU, pages that were never written take none."""
        size = int(self.zero.reduce_bucket_size)
        if not self.cuda:
            return self.width * min(size, self.trainable)
        return self.width * size * (2 if self.zero.overlap_comm and self.stage < 3 else 1)


def _offloads(settings) -> bool:
    return settings is not None and str(settings.device) != "none"


def model_states(layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes on the device and on the host that are held all the time: parameters, gradients, optimizer states.

    Optimizer states are AdamW's two moments in fp32 and, except for ZeRO-0 in fp32, fp32 master weights: DeepSpeed
    keeps masters under ZeRO-1 to 3 even if the parameters are fp32 themselves.
    """
    width, own = layout.width, sum(layout.partitions())
    if layout.stage == 0:
        return {
            "parameters": width * sum(layout.tensors),
            "gradients": width * layout.trainable,
            "optimizer": (8 if width == 4 else 12) * layout.trainable,
        }, {}
    device, host = {"optimizer": 12 * own}, {}
    if layout.stage < 3:
        device["parameters"] = width * (sum(layout.frozen) + own * layout.ranks)
        device["gradients"] = width * (layout.trainable if layout.stage == 1 else layout.touched())
    else:
        shards = width * sum(ceil(size / layout.ranks) for size in layout.tensors)
        persistent = width * layout.persistent() * (layout.ranks > 1)
        device["parameters"] = persistent + (0 if layout.offloads_parameters else shards)
        if layout.offloads_parameters:
            host["parameters"] = shards
        device["gradients"] = width * own
    if layout.offloads_optimizer:
        # DeepSpeed's CPU Adam reads fp32 gradients from the host. ZeRO-1 and 2 return the new weights through a buffer
        # in the model's precision, and move one gradient at a time through a buffer of the largest tensor at each end.
        host["optimizer"] = device.pop("optimizer") + 4 * own
        host["gradients"] = device.pop("gradients")
        if layout.stage < 3:
            host["parameters"] = width * own
            host["buffers"] = device["buffers"] = width * layout.largest
    return device, host


def phases(layout: Layout, passes: dict[str, Pass]) -> dict[str, dict[str, int]]:
    """Phase of a training step -> part -> bytes on the device of one rank, at the peak of the phase.

    Args: passes: "task pass" and "alignment pass", if a step has them.
    On a CPU what is offloaded is in the same memory, and counts.
    """
    device, host = model_states(layout)
    if not layout.cuda:
        device = {part: device.get(part, 0) + host.get(part, 0) for part in device.keys() | host.keys()}
    found = {name: _sum(device, _during(layout, one)) for name, one in passes.items()}
    found["reduction"] = _sum(device, _reduction(layout))
    found["optimizer step"] = _sum(device, _optimizer_step(layout, device))
    return {name: {part: each.get(part, 0) for part in PARTS} for name, each in found.items()}


def _sum(parts: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return {name: parts.get(name, 0) + more.get(name, 0) for name in parts.keys() | more.keys()}


def _during(layout: Layout, one: Pass) -> dict[str, int]:
    """What a pass adds to the model states."""
    buffers = 0
    if layout.stage == 1 and layout.cuda:
        buffers = layout.bucket()
    if layout.stage == 2:
        # allocated with the first gradient (setup_buckets); on a CPU only as much of it as gradients were written to
        gradients = min(one.peak_with_gradients - one.peak, layout.bucket())
        buffers = layout.bucket() if layout.cuda else gradients
    if layout.stage == 3:
        buffers = layout.bucket() + _gathered(layout)
    if layout.stage >= 2 and layout.trainable > layout.zero.reduce_bucket_size:  # reduced in the middle of backward
        buffers += _reduction_copies(layout)
    return {"activations": one.peak - one.logits, "logits": one.logits, "buffers": buffers}


def _gathered(layout: Layout) -> int:
    """Bytes of parameters that ZeRO-3 holds whole during a pass, beyond the persistent ones.

    It gathers ahead into a flat buffer, copies every tensor out of it (zero/partition_parameters.py,
    AllGatherCoalescedHandle), and keeps what comes up again within the reuse distance: at the turn from forward to
    backward that is half the distance. A pass without a trace of its own kind gathers less.
    """
    if layout.ranks == 1 and not layout.offloads_parameters:
        return 0
    large = [size for size in layout.tensors if size > layout.zero.param_persistence_threshold]
    ahead = int(layout.zero.prefetch_bucket_size) + max(large, default=0)
    return layout.width * min(sum(large), int(layout.zero.max_reuse_distance) // 2 + 2 * ahead)


def _reduction_copies(layout: Layout) -> int:
    """Bytes of what a full bucket is copied to while it is averaged: flattened again, twice for gloo in ZeRO-3."""
    elements = min(int(layout.zero.reduce_bucket_size), layout.trainable)
    return layout.width * elements * (2 if layout.stage == 3 and not layout.cuda else 1)


def _reduction(layout: Layout) -> dict[str, int]:
    """What averaging the gradients over the ranks adds, after the last backward (ZeRO-2 and 3: after each)."""
    width = layout.width
    if layout.stage == 0:  # engine.py, allreduce_bucket: half a billion elements at a time, flattened
        return {"buffers": width * min(layout.trainable, 500_000_000 + layout.largest)}
    copies = _reduction_copies(layout)
    if layout.stage < 3:  # gradients are in the bucket, then the rank's own are moved out of it
        copies = max(copies, width * layout.touched())
    return {"buffers": layout.bucket() + copies}


def _optimizer_step(layout: Layout, device: dict[str, int]) -> dict[str, int]:
    """What AdamW's step adds: fp32 gradients of a group, and off CUDA two temporary tensors of what it updates.

    torch's fused AdamW on CUDA needs none of the latter, nor does DeepSpeed's CPU Adam.
    """
    width, largest, group = layout.width, layout.largest, max(layout.partitions())
    adam = 0 if layout.cuda or layout.offloads_optimizer else 8
    if layout.stage == 0:
        masters = 4 * layout.trainable if width == 2 else 0  # bf16_optimizer.py: gradients in fp32
        return {"buffers": masters + adam * largest}
    if layout.offloads_optimizer:
        norm = 8 * largest if layout.stage < 3 else 8 * ceil(largest / layout.ranks)  # in fp64
        return {"buffers": norm + (width * largest if layout.stage < 3 else 0)}
    if layout.stage == 3:
        return {"buffers": (4 + adam) * group + layout.bucket()}
    update = {"buffers": (4 + adam) * group}
    if layout.cuda or layout.ranks == 1:
        return update
    # ZeRO-1 and 2 gather the new weights a group at a time; gloo makes a copy of the whole, when gradients are gone
    gathering = {"gradients": -device["gradients"], "buffers": width * group * layout.ranks}
    return max(update, gathering, key=lambda parts: sum(parts.values()))


def checkpoint_size(layout: Layout) -> int:
    """Bytes on disk of one checkpoint, the files of all ranks together: fp32 masters and Adam's two moments."""
    files = layout.ranks if layout.stage in (0, 3) else 1  # over which a parameter is cut, mostly
    records = _BYTES_PER_RECORD * files * sum(map(len, layout.groups)) + _BYTES_PER_RANK * layout.ranks
    return 12 * layout.trainable + records
