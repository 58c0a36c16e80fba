"""Pooled states of every layer of a model, for many sentences in one pass each, kept on disk. Used by `mlalign probe`.

A state file holds one language: [poolings, layers, distinct sentences, hidden], fp32. Its name carries a fingerprint
of the model, the settings and the sentences, so that an interrupted probe encodes only what it lacks.
"""

import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mlalign import __version__, distributed, jobs
from mlalign.collate import collate_ids, pad_id
from mlalign.config import Model
from mlalign.data import encode_text
from mlalign.errors import UserError
from mlalign.model import (
    decoder_parts,
    load_for_inference,
    load_model_config,
    load_tokenizer,
    precision_dtype,
    truncated_decoder,
)
from mlalign.parallel import Parallel
from mlalign.pooling import POOLERS
from mlalign.rundir import digest, files_of
from mlalign.sharding import inference_config, inference_engine
from mlalign.tracker import say
from mlalign.zero import read_deepspeed


@dataclass(frozen=True)
class Encoder:
    """What turns a sentence into states, and how."""

    model: str  #: a directory or a hub id
    adapter: str | None  #: a directory
    layers: tuple[
        int, ...
    ]  #: ascending, the last at least 1; 0 = the input of block 0, k = the output of block k, before any final norm
    poolings: tuple[str, ...]  #: names in `pooling.POOLERS`
    pool_bos: bool  #: whether the mean counts the state of the BOS token
    precision: str  #: auto, bf16 or fp32, see `config.Model`
    trust_remote_code: bool = False

    @property
    def source(self) -> Model:
        """What is to be loaded."""
        return Model(path=self.model, precision=self.precision, trust_remote_code=self.trust_remote_code)

    def fingerprint(self) -> str:
        """Stands for everything but the sentences that states depend on, the weights' files included."""
        revision = [] if os.path.isdir(self.model) else [load_model_config(self.source)._commit_hash]
        precision = str(precision_dtype(self.precision))  # auto is bf16 on one machine and fp32 on another
        parts = [asdict(self), __version__, precision, revision, files_of(self.model), files_of(self.adapter)]
        return digest(parts)


class LayerStates(nn.Module):
    """The first blocks of an LM, up to the highest wanted layer; one call returns the pooled states of all of them.

    States are pooled as each block ends and never kept per token.
    """

    def __init__(self, lm: nn.Module, encoder: Encoder) -> None:
        super().__init__()
        self.lm = lm
        self._poolers = [POOLERS[name] for name in encoder.poolings]
        self._view = [truncated_decoder(lm, encoder.layers[-1])]  # in a list: no submodule
        self._mask: torch.Tensor | None = None
        self._pooled: list[torch.Tensor] = []
        decoder, stack, _ = decoder_parts(lm)
        blocks = getattr(decoder, stack)
        if encoder.layers[0] == 0:
            blocks[0].register_forward_pre_hook(self._before_first, with_kwargs=True)
        for layer in encoder.layers:
            if layer > 0:
                blocks[layer - 1].register_forward_hook(self._after)

    def _before_first(self, _block, args, kwargs) -> None:
        self._pool(args[0] if args else kwargs["hidden_states"])

    def _after(self, _block, _args, output) -> None:
        self._pool(output[0] if isinstance(output, tuple) else output)

    def _pool(self, states: torch.Tensor) -> None:
        self._pooled.append(torch.stack([pool(states, self._mask) for pool in self._poolers]))

    def forward(self, inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """Args: inputs: `collate.collate_ids`; mask [rows, tokens]: what is pooled.

        Returns: [poolings, layers, rows, hidden], fp32.
        """
        self._mask, self._pooled = mask, []
        self._view[0](**inputs, use_cache=False)
        return torch.stack(self._pooled, dim=1)


def state_files(encoder: Encoder, parallel: Parallel, folder: Path) -> dict[str, Path]:
    """Language -> where its states are, or will be."""
    fingerprint = encoder.fingerprint()
    return {
        language: folder / f"{language}-{digest([fingerprint, parallel.texts[language]])}.npy"
        for language in parallel.languages
    }


def encode(
    encoder: Encoder,
    parallel: Parallel,
    files: dict[str, Path],
    batch_size: int,
    deepspeed: str | None,
    check: Callable[[], None],
) -> None:
    """Write the state files that are missing; every rank takes a share of each language. Nothing missing: no model.

    The batches do not depend on the number of ranks, so neither do the states.
    Args: deepspeed: a DeepSpeed file of ZeRO-3, which shards the model over the ranks; check: called by all ranks
    between batches, may raise to stop.
    """
    missing = None
    if distributed.is_main():  # a host that looks before rank 0 has written would remember that nothing is there
        missing = [language for language, path in files.items() if not path.exists()]
    missing = distributed.broadcast_object(missing)
    kept = len(files) - len(missing)
    if kept:
        say(f"{kept} of {len(files)} languages are encoded already")
    if not missing:
        return
    tokenizer = load_tokenizer(encoder.source)
    settings = load_model_config(encoder.source).get_text_config()
    positions = getattr(settings, "max_position_embeddings", None)
    module = _load(encoder, deepspeed)
    pad, bos = pad_id(tokenizer, getattr(settings, "vocab_size", math.inf)), tokenizer.bos_token_id
    for language in missing:
        start = time.monotonic()
        rows = [encode_text(text, tokenizer) for text in parallel.texts[language]]
        cut = sum(len(row) > positions for row in rows) if positions else 0
        rows = [row[:positions] for row in rows]
        states = None
        for index, part in _encoded(module, rows, batch_size, pad, None if encoder.pool_bos else bos, check):
            _refuse_non_finite(part, index, encoder, parallel.places[language])
            if states is None:
                states = np.empty((*part.shape[:2], len(rows), part.shape[3]), dtype=np.float32)
            states[:, :, index] = part.numpy()
        if distributed.is_main():
            _write(states, files[language])
            jobs.say_progress(f"{files[language]}")
        seconds = time.monotonic() - start
        note = f", {cut:,} cut at {positions:,} tokens" if cut else ""
        say(f"encoded {language}: {len(rows):,} sentences, {sum(map(len, rows)):,} tokens{note}, {seconds:.1f} s")
    if hasattr(module, "destroy"):
        module.destroy()  # DeepSpeed would keep the shards while the next model is loaded
    del module
    gc.collect()  # its blocks and its hooks hold each other: without this, the next model would come beside it


def load_layer(path: Path, pooling: int, layer: int) -> torch.Tensor:
    """[sentences, hidden]: one layer of a state file, by number of pooling and layer in it; no more is read."""
    return torch.from_numpy(np.array(np.load(path, mmap_mode="r")[pooling, layer]))


def _load(encoder: Encoder, deepspeed: str | None) -> nn.Module:
    sharded = inference_config(encoder.source, read_deepspeed(deepspeed)) if deepspeed else None
    module = LayerStates(load_for_inference(encoder.source, encoder.adapter, sharded), encoder)
    return inference_engine(module, sharded) if sharded else module


@torch.inference_mode()
def _encoded(
    module: nn.Module,
    rows: list[list[int]],
    batch_size: int,
    pad: int,
    unpooled: int | None,
    check: Callable[[], None],
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """On rank 0: (numbers of rows, their states on the CPU) batch by batch. Every rank must iterate.

    Args: unpooled: a first token that the mean leaves out, where it is not the only one; check: may raise to stop.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)  # what fits, fits at once
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    ranks = distributed.world_size()
    for start in range(0, len(batches), ranks):
        check()
        together = batches[start : start + ranks]
        # Ranks without a batch in the last round still take part: under ZeRO-3 a forward is a collective.
        own = together[min(distributed.rank(), len(together) - 1)]
        inputs = collate_ids([rows[i] for i in own], pad)
        mask = inputs["attention_mask"].clone()
        if unpooled is not None:
            first = (inputs["input_ids"][:, 0] == unpooled) & (mask.sum(1) > 1)
            mask[first, 0] = 0
        device = distributed.device()
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        states = module(inputs, mask.to(device))
        if ranks > 1:
            states = nn.functional.pad(states, (0, 0, 0, batch_size - len(own)))
        for rank, part in enumerate(distributed.to_main(states)):  # to its end, or a send would never be received
            if rank < len(together):
                yield together[rank], part[:, :, : len(together[rank])].cpu()


def _refuse_non_finite(states: torch.Tensor, index: list[int], encoder: Encoder, places: list[str]) -> None:
    if states.isfinite().all():
        return
    _, layer, row, _ = (~states.isfinite()).nonzero()[0].tolist()
    raise UserError(
        f"{places[index[row]]}: the state of {encoder.model} at layer {encoder.layers[layer]} is not a number: "
        "try --precision fp32, or look for broken weights"
    )


def _write(states: np.ndarray, path: Path) -> None:
    aside = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            np.save(file, states)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        gib = states.nbytes / 2**30
        raise UserError(f"{path} ({gib:.2f} GiB of states) cannot be written: {error.strerror or error}") from error
