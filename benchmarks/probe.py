"""What a probe costs, side by side with what people write: `python benchmarks/probe.py [FLORES]`, ten minutes.

Encoding: every sentence once and all layers in that pass, against both sides of every direction anew, as scripts do
that take one language pair. Scoring: `mlalign.retrieval`, against a loop over sentences, and against one matrix product
per direction. Memory: the peak of whole probes of 8, 16 and 32 languages, and of longer sentences. Ratios are of times
taken in this run; the model is random, for its weights do not matter here. FLORES is a directory with a file per
language, ../shared/data/flores200_devtest by default.
"""

import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from byte_llama import save_byte_llama
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlalign import retrieval
from mlalign.commands.probe import Settings, probe
from mlalign.parallel import read_parallel
from mlalign.states import Encoder, encode, load_layer, state_files

FLORES = Path(__file__).parents[2] / "shared/data/flores200_devtest"
LANGUAGES, SENTENCES, SCORED = 30, 32, 200
console = Console(width=110)


def make_model(folder: Path, blocks: int, hidden: int) -> str:
    torch.manual_seed(0)
    return save_byte_llama(
        folder,
        hidden_size=hidden,
        intermediate_size=hidden // 4,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=1,
    )


def write_text(flores: Path, folder: Path, languages: int, sentences: int, characters: int) -> Path:
    """The first sentences of the first languages, cut so that the benchmark takes minutes."""
    everything = read_parallel(str(flores), None, sentences, None)
    for language in everything.languages[:languages]:
        rows = everything.tables[0][language]
        lines = [f"{everything.texts[language][row][:characters].strip()} {number}" for number, row in enumerate(rows)]
        folder.mkdir(exist_ok=True)
        (folder / f"{language}.txt").write_text("\n".join(lines) + "\n")
    return folder


@torch.inference_mode()
def encode_pair_by_pair(model: str, texts: dict[str, list[str]]) -> None:
    """Both sides of every direction, in batches of 32 in file order, with all hidden states kept until pooled."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    for direction in itertools.permutations(texts, 2):
        for language in direction:
            for start in range(0, len(texts[language]), 32):
                batch = tokenizer(texts[language][start : start + 32], return_tensors="pt", padding=True)
                states = lm(**batch, output_hidden_states=True).hidden_states
                mask = batch["attention_mask"].unsqueeze(-1)
                [(state * mask).sum(1) / mask.sum(1) for state in states]


def score_by_loop(states: torch.Tensor, k: int = 4) -> list[float]:
    """Ratio-margin accuracy of every direction, sentence by sentence over numpy vectors."""
    rows = [[row / row.norm() for row in each] for each in states]
    rows = [[row.numpy() for row in each] for each in rows]
    n, scores = len(rows[0]), []
    for src, tgt in itertools.permutations(rows, 2):
        cosines = [[float(x @ y) for y in tgt] for x in src]
        near_src = [sum(sorted(row)[-k:]) / k for row in cosines]
        near_tgt = [sum(sorted(row[j] for row in cosines)[-k:]) / k for j in range(n)]
        hits = 0
        for i in range(n):
            candidates = sorted(range(n), key=lambda j, i=i: -cosines[i][j])[:k]
            hits += max(candidates, key=lambda j, i=i: 2 * cosines[i][j] / (near_src[i] + near_tgt[j])) == i
        scores.append(hits / n)
    return scores


def score_by_direction(states: torch.Tensor, k: int = 4) -> list[float]:
    """The same with a matrix product and two searches for each direction, and nothing shared between directions."""
    scores = []
    for src, tgt in itertools.permutations(states, 2):
        cosines = torch.nn.functional.normalize(src, dim=1) @ torch.nn.functional.normalize(tgt, dim=1).T
        near, index = cosines.topk(k, dim=1)
        average = near.mean(1, keepdim=True) + cosines.topk(k, dim=0).values.mean(0)[index]
        best = index.gather(1, (2 * near / average).argmax(1, keepdim=True)).squeeze(1)
        scores.append((best == torch.arange(len(src))).float().mean().item())
    return scores


def timed(function, *args) -> tuple[float, object]:
    start = time.perf_counter()
    value = function(*args)
    return time.perf_counter() - start, value


def peak_of_a_probe(model: str, data: Path, output: Path) -> str:
    """Peak resident memory in MiB of a probe in a process of its own: when it has started, and at its end."""
    command = [sys.executable, __file__, "--peak", model, str(data.with_name("small")), str(data), str(output)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("PEAK ")[1].strip()


def print_peak(model: str, small: str, data: str, output: str) -> None:
    probe(Settings(model=model, data=small, output=Path(output)))  # what a process needs with any data
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    probe(Settings(model=model, data=data, output=Path(output) / "all", batch_size=16))
    print("PEAK", before // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def compare_times(flores: Path, folder: Path) -> None:
    """Encoding and scoring, each beside the usual ways."""
    model = make_model(folder / "model", blocks=16, hidden=64)
    data = write_text(flores, folder / "text", LANGUAGES, SCORED, 60)

    table = Table("part", "way", "seconds", "ratio")
    parallel = read_parallel(str(data), None, SENTENCES, None)
    encoder = Encoder(model, None, tuple(range(17)), ("mean",), True, "fp32")
    files = state_files(encoder, parallel, folder / "states")
    encode(encoder, parallel, files, 32, None, lambda: None)  # a first pass, so that neither way pays for the start
    [path.unlink() for path in files.values()]
    ours, _ = timed(encode, encoder, parallel, files, 32, None, lambda: None)
    pairs, _ = timed(encode_pair_by_pair, model, parallel.texts)
    again, _ = timed(encode, encoder, parallel, files, 32, None, lambda: None)
    table.add_row("encoding", f"mlalign: {LANGUAGES * SENTENCES:,} sentences", f"{ours:.2f}", "1")
    table.add_row("", "pair by pair", f"{pairs:.2f}", f"{pairs / ours:.0f}")
    table.add_row("", "mlalign, resumed", f"{again:.3f}", f"{again / ours:.4f}", end_section=True)

    parallel = read_parallel(str(data), None, SCORED, None)
    files = state_files(encoder, parallel, folder / "states")
    encode(encoder, parallel, files, 32, None, lambda: None)
    states = torch.stack([load_layer(path, 0, 8) for path in files.values()])
    ids = torch.arange(SCORED).expand(LANGUAGES, -1)
    retrieval.retrieval(states, ids)
    ours, found = timed(retrieval.retrieval, states, ids)
    direct, by_direction = timed(score_by_direction, states)
    loop, by_loop = timed(score_by_loop, states)
    others = ~torch.eye(LANGUAGES, dtype=torch.bool)
    assert (found["margin_ratio"][others] - torch.tensor(by_loop)).abs().max() < 0.5 / SCORED
    assert (found["margin_ratio"][others] - torch.tensor(by_direction)).abs().max() < 2.5 / SCORED  # fp32 rounding
    table.add_row("scoring", f"mlalign: 1 layer, {SCORED} sentences, 5 measures", f"{ours:.3f}", "1")
    table.add_row("", "a product per direction, 1 measure", f"{direct:.3f}", f"{direct / ours:.1f}")
    table.add_row("", "a loop over sentences, 1 measure", f"{loop:.2f}", f"{loop / ours:.0f}")
    console.print(table)


def compare_memory(flores: Path, folder: Path) -> None:
    """Peaks of whole probes: 8, 16 and 32 languages, and longer sentences."""
    write_text(flores, folder / "small", 2, 5, 20)
    wide = make_model(folder / "wide", blocks=1, hidden=1024)
    table = Table("languages", "directions", "characters", "states of one layer, MiB", "peak above the start, MiB")
    for languages, characters in ((8, 20), (16, 20), (32, 20), (16, 60)):
        name = f"{languages}-{characters}"
        data = write_text(flores, folder / name, languages, 1000, characters)
        before, peak = map(int, peak_of_a_probe(wide, data, folder / f"out-{name}").split())
        size = languages * 1000 * 1024 * 4 / 2**20
        table.add_row(
            str(languages), str(languages * (languages - 1)), f"up to {characters}", f"{size:.0f}", str(peak - before)
        )
    console.print(table)


def main(flores: Path) -> None:
    if not flores.is_dir():
        console.print(f"skipped: {flores} is not a directory with parallel text")
        return
    with tempfile.TemporaryDirectory(prefix="probe-benchmark-") as folder:
        compare_times(flores, Path(folder))
        compare_memory(flores, Path(folder))


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if sys.argv[1:2] == ["--peak"]:
        print_peak(*sys.argv[2:])
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else FLORES)
