"""A task adapter and an alignment adapter become one: read, add up, cut to a rank. No base model is needed.

A LoRA module changes its weight W [out, in] by delta = scaling * B @ A (Hu et al. 2021, arXiv 2106.09685), and merging
is arithmetic of deltas (Ilharco et al. 2023, arXiv 2212.04089):

    merged = (1 - weight) * delta_task + weight * delta_alignment

`Factors` are (B [out, rank], A [rank, in]) in fp32 with all scaling in B, so that delta = B @ A.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, prune, task_arithmetic
from peft.utils.other import get_pattern_key
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file

from mlalign.errors import UserError, one_line
from mlalign.tracker import console

METHODS = ("linear", "ties", "dare_linear", "dare_ties")
SPARSE = METHODS[1:]  #: those that leave out entries of the deltas

Factors = tuple[torch.Tensor, torch.Tensor]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  #: peft's names
_PREFIX = "base_model.model."  #: of every tensor's name in them
_FROZEN = ".base_layer.weight"
_OVERSAMPLE, _ITERATIONS = 32, 8  # of the randomised SVD: within 1e-4 of the exact one's share on a 4096 x 4096 delta

#: Keys of adapter_config.json that are read here, or that say nothing about the delta. Any other one that is set
#: (DoRA, aLoRA, modules_to_save, ..., and what a newer peft invents) is a part of the adapter that no (B, A) holds.
_UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"),
    *("base_model_name_or_path", "revision", "fan_in_fan_out", "task_type", "auto_mapping", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("peft_version", "inference_mode", "runtime_config", "megatron_core", "qalora_group_size"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),  # of initialisations, which are checked by name
}
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base model's weights


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter as it lies on disk."""

    folder: Path
    config: dict[str, Any]  #: adapter_config.json
    factors: dict[str, Factors]  #: module of the base model -> (B, A)
    frozen: dict[str, torch.Tensor]  #: module -> its own weight, which peft saves beside the factors of `lm_head`
    fingerprint: str  #: of both files' contents


@dataclass(frozen=True)
class Recipe:
    """How two adapters become one."""

    weight: float  #: share of the alignment adapter, 0 to 1
    method: str = "linear"
    layers: int | None = None  #: the alignment adapter takes part in decoder blocks 1 to `layers`; None = everywhere
    rank: int | None = None  #: cut to this rank; None = no cut, or for sparse methods the sum of both ranks
    density: float = 0.5  #: of sparse methods: share of a delta's entries that are kept
    seed: int = 0  #: of dare's choice of entries


@dataclass(frozen=True)
class Merged:
    """The merged adapter."""

    factors: dict[str, Factors]  #: all of one rank
    frozen: dict[str, torch.Tensor]  #: as in Adapter
    kept: dict[str, tuple[float, float]]  #: module -> (kept, whole) squared Frobenius norm of the merged delta

    @property
    def rank(self) -> int:
        return next(iter(self.factors.values()))[1].shape[0]

    def share(self) -> float:
        """Share of the squared Frobenius norm that the cut to a rank left, over all modules."""
        whole = sum(whole for _, whole in self.kept.values())
        return sum(kept for kept, _ in self.kept.values()) / whole if whole else 1.0

    def worst(self) -> tuple[str, float]:
        """The module that lost most to the cut, and the share that is left of it."""
        shares = {module: kept / whole if whole else 1.0 for module, (kept, whole) in self.kept.items()}
        return min(shares.items(), key=lambda item: item[1])


# ----------------------------------------------------------------------------------------------------------- reading


def read_adapter(path: str, name: str) -> Adapter:
    """Read a LoRA adapter from its directory, or from `adapter/` in a run directory.

    Args: name: what the user calls it, for messages.
    Raises UserError for files that are missing or cut, and for an adapter that is more than a pair (B, A) per module.
    """
    folder = next((each for each in (Path(path), Path(path) / "adapter") if (each / CONFIG).is_file()), None)
    if folder is None:
        raise UserError(f"{name} {path} holds no {CONFIG}: name an adapter's directory or a run of `mlalign train`")
    where = f"{name} {folder}"
    try:
        config = json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise UserError(f"{where}: {WEIGHTS} is missing: export the adapter again, as safetensors") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{where} cannot be read, is it whole? {one_line(error)}") from error
    _check_config(config, where)
    factors, frozen = _tensors(config, weights, where)
    return Adapter(folder, config, factors, frozen, _fingerprint(folder))


def _fingerprint(folder: Path) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in (CONFIG, WEIGHTS):
        with (folder / name).open("rb") as file:
            found.update(hashlib.file_digest(file, "blake2b").digest())
    return found.hexdigest()


def _check_config(config: Any, where: str) -> None:
    """Refuse everything that makes an adapter more than scaling * B @ A on some Linear layers."""
    if not isinstance(config, dict):
        raise UserError(f"{where}: {CONFIG} holds no object")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {config.get('peft_type')}, and only LORA can be merged")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"{where}: r is {'missing' if rank is None else repr(rank)} in {CONFIG}, it must be 1 or more")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise UserError(f"{where}: lora_alpha is {'missing' if alpha is None else repr(alpha)}, it must be a number")
    if config.get("bias", "none") != "none":
        raise UserError(f"{where}: bias is {config['bias']!r}, and trained biases cannot be merged: train with none")
    initialisation = config.get("init_lora_weights", True)
    if initialisation not in _INITIALISATIONS:
        raise UserError(
            f"{where}: init_lora_weights is {initialisation!r}, which may have changed the base model's weights: "
            "convert it to a plain LoRA with peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(isinstance(value, int | float) for value in pattern.values()):
            raise UserError(f"{where}: {key} is {pattern!r}, it must give modules numbers")
    more = next((key for key, value in config.items() if value and key not in _UNDERSTOOD), None)
    if more is not None:
        raise UserError(
            f"{where}: {more} is set, so the adapter is more than a pair A, B for each Linear, and cannot be merged"
        )


def _tensors(
    config: dict[str, Any], weights: dict[str, torch.Tensor], where: str
) -> tuple[dict[str, Factors], dict[str, torch.Tensor]]:
    """Module -> (B, A), and module -> its frozen weight."""
    suffixes = (".lora_A.weight", ".lora_B.weight")
    modules = sorted({key.removeprefix(_PREFIX)[: -len(suffixes[0])] for key in weights if key.endswith(suffixes)})
    frozen = {module: weights.pop(f"{_PREFIX}{module}{_FROZEN}", None) for module in modules}
    frozen = {module: weight for module, weight in frozen.items() if weight is not None}
    for key, tensor in weights.items():
        if not key.startswith(_PREFIX) or not key.endswith(suffixes) or tensor.ndim != 2:
            raise UserError(f"{where}: {key} {list(tensor.shape)} is no A or B of a Linear, and cannot be merged")
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {key} holds NaN or infinity, its training diverged")
    if not modules:
        raise UserError(f"{where}: {WEIGHTS} holds no tensors, export the adapter again")
    factors: dict[str, Factors] = {}
    for module in modules:
        a, b = (weights.get(f"{_PREFIX}{module}{suffix}") for suffix in suffixes)
        if a is None or b is None:
            raise UserError(f"{where}: {module} has no lora_{'A' if a is None else 'B'}, the file is not whole")
        rank = _of_pattern(config, "rank_pattern", module, config["r"])
        if (a.shape[0], b.shape[1]) != (rank, rank):
            raise UserError(
                f"{where}: {module} has A {list(a.shape)} and B {list(b.shape)}, but {CONFIG} gives it r {rank}"
            )
        alpha = _of_pattern(config, "alpha_pattern", module, config["lora_alpha"])
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        factors[module] = (b.float() * scaling, a.float())
    return factors, frozen


def _of_pattern(config: dict[str, Any], key: str, module: str, default: float) -> float:
    """As peft looks it up: `tuners.lora.model._create_and_replace`."""
    pattern = config.get(key) or {}
    return pattern.get(get_pattern_key(pattern.keys(), module), default)


def check_pair(task: Adapter, alignment: Adapter, one_model: bool) -> None:
    """Raises UserError for two adapters of different base models, or whose modules do not go together.

    Args: one_model: the user says that it is one, whatever names the adapters have for it.
    """
    for key in ("fan_in_fan_out",) if one_model else ("base_model_name_or_path", "revision", "fan_in_fan_out"):
        values = [_normal(adapter.config.get(key)) for adapter in (task, alignment)]
        if values[0] != values[1]:
            raise UserError(
                f"{key} is {values[0]} in {task.folder} and {values[1]} in {alignment.folder}: only adapters of the "
                "same base model can be merged; if it is one under two names, say so by --model"
            )
    for module in task.factors.keys() & alignment.factors.keys():
        shapes = [shape(adapter.factors[module]) for adapter in (task, alignment)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{module} is {shapes[0][0]} x {shapes[0][1]} in {task.folder} and {shapes[1][0]} x {shapes[1][1]} in "
                f"{alignment.folder}: they were trained on different models"
            )
    for module in task.frozen.keys() & alignment.frozen.keys():
        weights = [adapter.frozen[module] for adapter in (task, alignment)]
        coarse = min((weight.dtype for weight in weights), key=lambda dtype: dtype.itemsize)
        if not torch.equal(*(weight.to(coarse) for weight in weights)):
            raise UserError(
                f"{module} has one weight in {task.folder} and another in {alignment.folder}: they were trained on "
                "different models"
            )
    stacks = [{stack(module) for module in adapter.factors} - {None} for adapter in (task, alignment)]
    if stacks[0] and stacks[1] and not stacks[0] & stacks[1]:
        raise UserError(
            f"{task.folder} has modules in {min(stacks[0])} and {alignment.folder} in {min(stacks[1])}: they were "
            "trained on different classes of the model"
        )


def _normal(value: Any) -> Any:
    """Equal for two ways of writing the same directory, and for a default that is written out."""
    if isinstance(value, str) and Path(value).is_dir():
        return str(Path(value).resolve())
    return value or None


def shape(factors: Factors) -> tuple[int, int]:
    """[out, in] of a module."""
    return factors[0].shape[0], factors[1].shape[1]


# ------------------------------------------------------------------------------------------------------------ layers


def block(module: str) -> int | None:
    """Index of the decoder block that a module is in; None outside all of them, such as `lm_head`.

    The first number in the name, which is peft's rule for `layers_to_transform` too.
    """
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def stack(module: str) -> str | None:
    """The list of blocks that a module is in: `model.layers` of `model.layers.3.mlp.up_proj`."""
    number = block(module)
    return None if number is None else module.split(f".{number}.")[0]


def shares(module: str, recipe: Recipe) -> tuple[float, float]:
    """How much of the task's and of the alignment's delta a module gets.

    Above `layers` the task adapter stays whole: an alignment adapter that was trained at a layer is zero above it, so
    averaging there would do nothing but shrink the task.
    """
    number = block(module)
    if recipe.layers is not None and (number is None or number >= recipe.layers):
        return 1.0, 0.0
    return 1 - recipe.weight, recipe.weight


def left_out(alignment: Adapter, layers: int) -> list[str]:
    """Modules outside blocks 1 to `layers` in which the alignment adapter is not zero."""
    above = [module for module in alignment.factors if shares(module, Recipe(1.0, layers=layers))[1] == 0]
    return [module for module in above if _changes(alignment.factors[module])]


def aligned_blocks(adapter: Adapter) -> int | None:
    """Number of the last block in which an adapter is not zero; None where it is not zero outside blocks."""
    numbers = [block(module) for module, factors in adapter.factors.items() if _changes(factors)]
    return None if None in numbers else max(numbers, default=-1) + 1


def _changes(factors: Factors) -> bool:
    return all(factor.any() for factor in factors)


# ----------------------------------------------------------------------------------------------------------- merging


def merge_adapters(task: Adapter, alignment: Adapter, recipe: Recipe, device: torch.device) -> Merged:
    """Merge every module that one of the adapters has; one that the other lacks is a delta of zero there.

    One module at a time is on `device`. A part with weight 0 is left out and takes no rank. Sparse methods settle what
    two adapters dispute: where only one takes part, it stays whole.
    """
    factors: dict[str, Factors] = {}
    kept: dict[str, tuple[float, float]] = {}
    modules = sorted(task.factors.keys() | alignment.factors.keys())
    shown = recipe.method in SPARSE and console.is_terminal  # linear is done in a second
    for module in track(modules, recipe.method, console=console, transient=True, disable=not shown):
        of_both = [(weight, each) for weight, each in zip(shares(module, recipe), (task, alignment)) if weight]
        parts = [
            (weight, tuple(factor.to(device) for factor in each.factors[module]))
            for weight, each in of_both
            if module in each.factors
        ]
        if not parts:
            continue
        if recipe.method == "linear" or len(of_both) < 2:
            b, a = concatenate(parts)
            whole = squared_norm(b, a)
            if recipe.rank is not None and a.shape[0] > recipe.rank:
                b, a = truncate(b, a, recipe.rank)
        else:
            deltas = [each[0] @ each[1] for _, each in parts]
            if len(parts) < 2:
                zero = torch.zeros_like(deltas[0])
                deltas = [*deltas, zero] if module in task.factors else [zero, *deltas]
            with _seeded(f"{recipe.seed} {module}", device):
                delta = combine(deltas, [weight for weight, _ in of_both], recipe.method, recipe.density)
                whole = float(delta.square().sum())
                b, a = factorise(delta, recipe.rank or sum(each[1].shape[0] for _, each in parts))
        factors[module] = (b.cpu(), a.cpu())
        kept[module] = (min(squared_norm(b, a), whole), whole)
    if not factors:
        raise UserError("nothing is left to merge: weight and layers leave out every module of both adapters")
    rank = max(a.shape[0] for _, a in factors.values())
    frozen = {module: weight for module, weight in (task.frozen | alignment.frozen).items() if module in factors}
    return Merged({module: _padded(b, a, rank) for module, (b, a) in factors.items()}, frozen, kept)


def tensors(merged: Merged) -> dict[str, torch.Tensor]:
    """The merged adapter's tensors under peft's names."""
    named = {f"{_PREFIX}{module}{_FROZEN}": weight for module, weight in merged.frozen.items()}
    for module, (b, a) in merged.factors.items():
        named |= {f"{_PREFIX}{module}.lora_A.weight": a, f"{_PREFIX}{module}.lora_B.weight": b}
    return {name: tensor.contiguous() for name, tensor in named.items()}


def concatenate(parts: list[tuple[float, Factors]]) -> Factors:
    """The weighted sum of deltas, exactly: sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...].

    Args: parts: (weight, (B [out, r_i], A [r_i, in])).
    Returns: [out, sum r_i], [sum r_i, in].
    """
    return torch.cat([weight * b for weight, (b, _) in parts], dim=1), torch.cat([a for _, (_, a) in parts])


def truncate(b: torch.Tensor, a: torch.Tensor, rank: int) -> Factors:
    """The best approximation of B @ A of a rank, in the Frobenius norm (Eckart & Young 1936).

    From the factors, never the matrix: with B = Q_b R_b and A^T = Q_a R_a, the SVD of the small R_b R_a^T gives that of
    the product. In fp64, which costs nothing here, so that full rank gives the delta back.
    Args: b [out, r], a [r, in]. Returns: [out, min(rank, r)], [min(rank, r), in], the singular values shared evenly.
    """
    left, right = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, values, v = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    root = values[:rank].sqrt()
    return (left.Q @ (u[:, :rank] * root)).float(), ((root[:, None] * v[:rank]) @ right.Q.T).float()


def combine(deltas: list[torch.Tensor], weights: list[float], method: str, density: float) -> torch.Tensor:
    """Merge two whole deltas [out, in] by a sparse method, from the pieces in `peft.utils.merge_utils`.

    ties         keep the `density` of entries that are largest; by entry elect the sign of the larger weighted sum; add
                 up what has that sign (after Yadav et al. 2023, arXiv 2306.01708, algorithm 1)
    dare_linear  drop entries at random, divide the others by `density` (Yu et al. 2024, arXiv 2311.03099), and add up
    dare_ties    drop and divide likewise, then elect and add up as ties

    The papers define them on deltas. `add_weighted_adapter` of peft applies them to A and B apart, which is another
    thing: a sum of products is no product of sums, and a sign elected for A says nothing about the sign of B @ A.

    The paper of ties averages over the adapters that agree on an entry and leaves the scale to a factor that is tuned.
    Here weights say how much of each adapter there is, as in `linear`: it is the same sum, without the entries that an
    adapter has least of and those that lose the election. So a weight of 0 leaves the other adapter alone, and where
    both agree the entry is that of `linear`.
    """
    if density < 1:
        how = ("magnitude", False) if method == "ties" else ("random", True)
        deltas = [prune(delta, density, how[0], rescale=how[1]) for delta in deltas]
    if method == "dare_linear":
        return task_arithmetic(deltas, deltas[0].new_tensor(weights))
    weighted = torch.stack([weight * delta for weight, delta in zip(weights, deltas)])
    return (weighted * calculate_majority_sign_mask(weighted)).sum(dim=0)


def factorise(delta: torch.Tensor, rank: int) -> Factors:
    """Cut a whole delta [out, in] to a rank, by randomised SVD (Halko, Martinsson & Tropp 2011, algorithm 5.1).

    Exact up to rounding where 32 more than `rank` columns span the delta.
    Returns: [out, r], [r, in] with r = min(rank, out, in).
    """
    u, values, v = torch.svd_lowrank(delta, min(rank + _OVERSAMPLE, *delta.shape), _ITERATIONS)
    root = values[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:, :rank].T


def squared_norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """The squared Frobenius norm of B [out, r] @ A [r, in], without the product."""
    b, a = b.double(), a.double()
    return float(((b.T @ b) * (a @ a.T)).sum())


@contextmanager
def _seeded(text: str, device: torch.device) -> Iterator[None]:
    """A random state for each module, so that their order does not matter; CPU and GPU draw different numbers."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big"))
        yield


def _padded(b: torch.Tensor, a: torch.Tensor, rank: int) -> Factors:
    """Zeros up to a rank, which leave B @ A as it is."""
    missing = rank - a.shape[0]
    return torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))
