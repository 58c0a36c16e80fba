"""`mlalign probe MODEL --data DIR --output DIR`: at which layer do translations find each other?

DIR holds one `<language>.jsonl` per language with a `text` field, line n of every file being the same sentence. Each
sentence passes the model once; the mean-pooled states after every decoder block give the top-1 retrieval accuracy over
all N(N-1) directions. Writes `probe.json` and `layers.png`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from mlalign import pooling, retrieval
from mlalign.config import Model, Source
from mlalign.data import collate_ids, encode_text, pad_id
from mlalign.distributed import device, launched
from mlalign.errors import UserError
from mlalign.model import decoder_parts, load_for_inference, load_tokenizer
from mlalign.plots import plot_layers
from mlalign.rows import read_rows
from mlalign.tracker import say


def probe(
    model: str, data: Path, output: Path, adapter: str | None, batch_size: int, max_sentences: int | None
) -> dict:
    """Measure every layer. Returns what `probe.json` holds: `languages`, `sentences`, `accuracy`, `directions`.

    `accuracy[k]` is the mean over directions at layer k (0 = embeddings, k = output of block k, before any final norm);
    `directions[k][src][tgt]` is one direction.
    """
    if launched():
        raise UserError("probe runs as one process: start it without a launcher")
    tokenizer = load_tokenizer(Model(path=model))
    sentences = _read(data, max_sentences)
    lm = load_for_inference(model, adapter)
    states = {}
    for language, texts in sentences.items():
        states[language] = _encode(lm, [encode_text(text, tokenizer) for text in texts], batch_size, pad_id(tokenizer))
        say(f"encoded {language}")
    directions = [
        {
            src: {tgt: retrieval.accuracy(a[layer], b[layer]) for tgt, b in states.items() if tgt != src}
            for src, a in states.items()
        }
        for layer in range(len(next(iter(states.values()))))
    ]
    accuracy = [_mean([score for row in layer.values() for score in row.values()]) for layer in directions]
    count = len(next(iter(sentences.values())))
    result = {"languages": list(states), "sentences": count, "accuracy": accuracy, "directions": directions}
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "probe.json").write_text(json.dumps(result, indent=2) + "\n")
        plot_layers({"retrieval": accuracy}, output / "layers.png")
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror}") from error
    for layer, score in enumerate(accuracy):
        say(f"layer {layer:2d}  retrieval accuracy {score:.3f}")
    return result


def _read(folder: Path, limit: int | None) -> dict[str, list[str]]:
    """language -> sentences, the same number for all."""
    paths = sorted(folder.glob("*.jsonl"))
    if len(paths) < 2:
        raise UserError(f"{folder} holds {len(paths)} .jsonl files: a probe needs one per language, two at least")
    sentences: dict[str, list[str]] = {}
    for path in paths:
        rows = list(read_rows(Source(path=str(path))))
        for where, row in rows:
            if not isinstance(row.get("text"), str) or not row["text"].strip():
                raise UserError(f"{where}: no text in field 'text'")
        sentences[path.stem] = [row["text"] for _, row in rows][:limit]
    first, *others = sentences
    for language in others:
        if len(sentences[language]) != len(sentences[first]):
            raise UserError(
                f"{folder / language}.jsonl has {len(sentences[language])} sentences, but {first}.jsonl has "
                f"{len(sentences[first])}: line n must be the same sentence in every file"
            )
    if len(sentences[first]) < 2:
        raise UserError(f"{folder}: a probe needs at least two sentences")
    return sentences


@torch.inference_mode()
def _encode(lm: nn.Module, rows: list[list[int]], batch_size: int, pad: int) -> torch.Tensor:
    """Mean-pooled states of every layer, [layers + 1, rows, hidden], fp32 on the CPU; nothing is kept per token."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts = []
    for start in range(0, len(order), batch_size):
        batch = collate_ids([rows[i] for i in order[start : start + batch_size]], pad)
        batch = {name: tensor.to(device()) for name, tensor in batch.items()}
        with _pooled_states(lm, batch["attention_mask"]) as pooled:
            lm.get_decoder()(**batch, use_cache=False)
        parts.append(torch.stack(pooled))
    states = torch.cat(parts, dim=1)
    return states[:, torch.tensor(order).argsort()]


@contextmanager
def _pooled_states(lm: nn.Module, mask: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """While open, a forward pass of the decoder appends the pooled input of block 0 and output of every block."""
    decoder, stack, _ = decoder_parts(lm)
    blocks = getattr(decoder, stack)
    pooled: list[torch.Tensor] = []

    def before(_block, args, kwargs) -> None:
        pooled.append(pooling.mean(args[0] if args else kwargs["hidden_states"], mask).cpu())

    def after(_block, _args, output) -> None:
        pooled.append(pooling.mean(output[0] if isinstance(output, tuple) else output, mask).cpu())

    hooks = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [block.register_forward_hook(after) for block in blocks]
    try:
        yield pooled
    finally:
        for hook in hooks:
            hook.remove()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
