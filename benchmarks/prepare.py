"""What preparing bitext costs, side by side with what people write: `python benchmarks/prepare.py`, two minutes.

Two million made-up Moses pairs of nine to thirteen words, a tenth of them copies: half of those letter by letter, half
in capitals and with another full stop. `mlalign prepare bitext` on the first half million and on all of them, against a
script that holds the normal forms of all pairs in a Python set, each in a process of its own. Rows per second and
memory are above those of the same command on 1,000 rows, so that the start (of torch, among others) does not count.
Both must keep the same number of rows, the one that was made.
"""

import json
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

SIZES = (500_000, 2_000_000)
BLOCK = 20  #: of so many pairs, the last two are copies of earlier ones
console = Console(width=110)


def write_pairs(folder: Path, count: int) -> int:
    """`X.de-en.de` and `X.de-en.en`; returns how many pairs are no copies."""
    random = np.random.default_rng(0)
    letters = {"de": list("enisratdhulcgmobwfkzäöüß"), "en": list("etaoinshrdlucmfwypvbgk")}
    words = {
        code: ["".join(random.choice(each, size)) for size in random.integers(2, 10, 4096)]
        for code, each in letters.items()
    }
    folder.mkdir()
    for code in ("de", "en"):
        with (folder / f"X.de-en.{code}").open("w") as file:
            for start in range(0, count, BLOCK):
                lines = []
                for number, chosen in enumerate(random.integers(0, 4096, (BLOCK - 2, 12)).tolist()):
                    text = " ".join(words[code][each] for each in chosen[: 8 + chosen[-1] % 5])
                    lines.append(f"{text.capitalize()} {start + number}.\n")
                lines += [lines[3], lines[5].upper().replace(".", "!")]
                file.writelines(lines[: count - start])
    full, rest = divmod(count, BLOCK)
    return full * (BLOCK - 2) + min(rest, BLOCK - 2)


def by_set(folder: Path, output: Path) -> None:
    """The usual script: normal forms of all pairs in a set."""
    removed = {
        code: None
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code))[0] in "PZ" or unicodedata.category(chr(code)) in ("Cc", "Cf")
    }

    def normal(text: str) -> str:
        return unicodedata.normalize("NFKC", text).casefold().translate(removed)

    seen = set()
    output.mkdir()
    files = (folder / "X.de-en.de").open(), (folder / "X.de-en.en").open()
    with files[0] as de, files[1] as en, (output / "train.de-en.jsonl").open("w") as out:
        for number, (src, tgt) in enumerate(zip(de, en), 1):
            src, tgt = src.strip(), tgt.strip()
            key = (normal(src), normal(tgt))
            if not all(key) or key[0] == key[1] or key in seen:
                continue
            seen.add(key)
            row = {"id": f"X.de-en-{number}", "src_lang": "de", "tgt_lang": "en", "src": src, "tgt": tgt}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(way: str, folder: Path, output: Path) -> tuple[float, float, int]:
    """Seconds, peak of resident memory in MiB, and rows written, of one process."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--one", way, str(folder), str(output)], capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - start
    with (output / "train.de-en.jsonl").open("rb") as file:
        rows = sum(1 for _ in file)
    return seconds, int(done.stdout.split("PEAK ")[1]) / 1024, rows


def one(way: str, folder: Path, output: Path) -> None:
    import resource

    if way == "set":
        by_set(folder, output)
    else:
        from mlalign.commands.prepare import Settings, prepare

        prepare(Settings("bitext", str(folder), output))
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main(folder: Path) -> None:
    table = Table("pairs", "way", "seconds", "pairs a second", "peak above the start, MiB", "bytes a pair kept")
    start = {}
    for size in (1000, *SIZES):
        expected = write_pairs(folder / str(size), size)
        for way in ("mlalign", "set"):
            seconds, peak, rows = measure(way, folder / str(size), folder / f"{way}-{size}")
            assert rows == expected, (way, size, rows, expected)
            if size == 1000:
                start[way] = seconds, peak
                continue
            seconds, more = seconds - start[way][0], peak - start[way][1]
            name = "mlalign prepare bitext" if way == "mlalign" else "a set of normal forms"
            rate, each = f"{size / seconds:,.0f}", f"{more * 2**20 / rows:.0f}"
            table.add_row(f"{size:,}", name, f"{seconds:.1f}", rate, f"{more:,.0f}", each)
    console.print(table)
    console.print("  ".join(f"start of {way}: {s:.1f} s, {peak:.0f} MiB" for way, (s, peak) in start.items()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        with tempfile.TemporaryDirectory(prefix="prepare-benchmark-") as temporary:
            main(Path(temporary))
