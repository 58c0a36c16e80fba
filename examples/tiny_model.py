"""A small language model to try things with on a laptop: `python examples/tiny_model.py OUTPUT TEXT.jsonl ...`

Trains a tokenizer and a Llama of 6 blocks on every `text`, `utt`, `src` and `tgt` of the rows, for some minutes. It has
no chat template, so its task rows are prepared with --format plain.
"""

import sys
from pathlib import Path

from mlalign.base_model import Shape, train_base
from mlalign.config import Source
from mlalign.rows import read_rows

FIELDS = ("text", "utt", "src", "tgt")


def main(output: Path, paths: list[str], steps: int = 1500) -> None:
    """Train on what the files hold, and save into `output`."""
    sentences = [
        row[name] for path in paths for _, row in read_rows(Source(path=path)) for name in FIELDS if name in row
    ]

    def progress(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"step {step}/{steps}  loss {loss:.3f}", flush=True)

    train_base(
        [text for text in sentences if len(text) < 200],
        output,
        0,
        Shape(vocabulary=4000, max_tokens=512),
        steps=steps,
        batch_size=32,
        progress=progress,
    )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
