"""How the two objectives pull at each layer: cosine and norm ratio of their gradients, logged by `log_gradients: true`.

The engine adds both objectives' gradients up, and keeps neither. Hooks on the parameters take them in as a step's
backward passes make them, in the same way for every ZeRO stage.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mlalign.distributed import all_sum, device
from mlalign.model import AlignedModel

_ELEMENTS = 2**20  #: of a layer's gradient that are looked at, about: of more, every n-th


class GradientMeter:
    """A context around the backward passes of one step; `begin` says whose they are, and `read` what was found."""

    def __init__(self, model: AlignedModel, wanted: bool = True) -> None:
        self._layers = model.reached() if wanted else {}
        self._every = {layer: _stride(parameters) for layer, parameters in self._layers.items()}
        self._sums: dict[str, dict[int, torch.Tensor]] = {}  #: objective -> id of a parameter -> gradient so far
        self._objective = ""
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "GradientMeter":
        for layer, parameters in self._layers.items():
            for parameter in parameters:
                add = partial(self._add, id(parameter), self._every[layer])
                self._handles.append(parameter.register_hook(add))
        return self

    def begin(self, objective: str) -> None:
        """The passes that come now are of this objective: task or alignment."""
        self._objective = objective
        self._sums.setdefault(objective, {})

    def _add(self, parameter: int, every: int, gradient: torch.Tensor) -> None:
        part, sums = gradient.detach().reshape(-1)[::every], self._sums[self._objective]
        sums[parameter] = sums[parameter] + part if parameter in sums else part.to(torch.float32, copy=True)

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def read(self) -> dict[str, float]:
        """`gradients/cosine_layer_04` and `gradients/norm_ratio_layer_04`: norm of alignment by that of the task.

        They are of the gradients over all ranks, each with its objective's weight, before clipping; from layer 1 (0,
        the embeddings, where they are trained, with the LM head if it is tied to them) to that of alignment. Called by
        all ranks, which reduce once.
        Returns: nothing where the step was not of both objectives, nor for a layer where one has no gradient.
        """
        if not self._layers or self._sums.keys() != {"task", "alignment"}:
            return {}
        wholes = [self._whole(objective, layer) for layer in self._layers for objective in ("task", "alignment")]
        parts = all_sum(torch.cat(wholes)).split(list(map(len, wholes)))
        found = torch.stack([_compared(task, alignment) for task, alignment in zip(parts[::2], parts[1::2])])
        values = {}
        for layer, (cosine, ratio) in zip(self._layers, found.tolist()):
            if math.isfinite(cosine):
                values |= {
                    f"gradients/cosine_layer_{layer:02}": cosine,
                    f"gradients/norm_ratio_layer_{layer:02}": ratio,
                }
        return values

    def _whole(self, objective: str, layer: int) -> torch.Tensor:
        """Of all parameters of a layer; zeros for those that this rank did not reach, such as experts."""
        every, sums = self._every[layer], self._sums[objective]
        return torch.cat(
            [
                sums[id(each)] if id(each) in sums else torch.zeros(-(-_size(each) // every), device=device())
                for each in self._layers[layer]
            ]
        )


def _compared(task: torch.Tensor, alignment: torch.Tensor) -> torch.Tensor:
    """[2]: cosine, and norm of alignment / norm of task; no number where one is zero."""
    norms = task.norm(), alignment.norm()
    cosine = (task / norms[0]) @ (alignment / norms[1])
    return torch.stack([cosine, norms[1] / norms[0]])


def _stride(parameters: list[nn.Parameter]) -> int:
    """Of how many elements one is looked at; prime to all row lengths, or it would be the same few columns of each."""
    every = -(-sum(map(_size, parameters)) // _ELEMENTS)
    widths = {_shape(parameter)[-1] for parameter in parameters if _shape(parameter)}
    while any(math.gcd(every, width) > 1 for width in widths):
        every += 1
    return every


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ds_: whole, where ZeRO-3 shards


def _size(parameter: nn.Parameter) -> int:
    return math.prod(_shape(parameter))
