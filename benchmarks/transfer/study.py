"""Does alignment make a task carry over? Trains, evaluates and compares: `python benchmarks/transfer/study.py`.

From nothing but public data to tables and pictures: a base model is pretrained on unlabelled text, fine-tuned in every
way that studies.py lists, with several seeds, by mlalign's own commands, evaluated and probed. Run it again after an
interruption, or with a larger budget, and it goes on. `--model` takes any other base model instead of making one, and
trains it by LoRA with the paper's settings.

    python benchmarks/transfer/study.py main --budget-minutes 30     # as `make study`
    python benchmarks/transfer/study.py main layer batch --size 5m   # several studies, no limit
    python benchmarks/transfer/study.py main --model Qwen/Qwen2.5-0.5B --jobs 1

OUTPUT/<study>.md, .png, .json     what was found        OUTPUT/cells/<arm>/seed-<n>   what it was found from
OUTPUT/base                        the base model        OUTPUT/data                   rows, as mlalign prepares them
"""

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from rich.markdown import Markdown

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import findings
import material
import torch
from cells import RECIPE, Cell, Setting, announce, probe, run_all
from studies import STUDIES, Study

from mlalign.config import Model
from mlalign.durable import write_whole
from mlalign.errors import UserError
from mlalign.model import load_model_config
from mlalign.rundir import make_writable
from mlalign.tracker import console, say

DATA = Path(__file__).parents[3] / "shared" / "data"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; main by default")
    parser.add_argument("--size", choices=material.SIZES, default="5m", help="of base model, languages and steps")
    parser.add_argument("--model", help="a base model that is there, instead of one made here")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget-minutes", type=float, default=float("inf"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() if not torch.cuda.is_available() else 1)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped like Ctrl-C, so that no command stays behind
    try:
        unknown = [name for name in options.studies if name not in STUDIES]
        if unknown:
            raise UserError(f"study {unknown[0]} is not one of {', '.join(STUDIES)}")
        if options.seeds < 1 or options.jobs < 1:
            raise UserError("--seeds and --jobs must be at least 1")
        studies = [STUDIES[name] for name in options.studies or ["main"]]
        for study in studies:
            for corpus in {arm.task.corpus for arm in study.arms}:
                if options.model is None and corpus not in material.SIZES[options.size].corpora:
                    fits = [name for name, size in material.SIZES.items() if corpus in size.corpora]
                    raise UserError(f"study {study.name} needs a base model that has read {corpus}: --size {fits[0]}")
        run(studies, options)
    except UserError as error:
        sys.exit(f"study: error: {error}")
    except KeyboardInterrupt:
        sys.exit("study: stopped; the same command goes on")


def run(studies: list[Study], options: argparse.Namespace) -> None:
    """Make what is missing, within the budget, and write what was found."""
    start, size = time.monotonic(), material.SIZES[options.size]
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # else every command says that it found no other
    deadline = start + 60 * options.budget_minutes - 15  # to draw
    _claim(options)
    announce("rows, bitext and parallel text")
    material.prepare(options.data, options.output / "data", size, studies)
    if options.model is None:
        torch.set_num_threads(os.cpu_count() or 1)
        material.base_model(options.data, options.output / "base", size, seed=0, deadline=deadline)
    base = options.model or str(options.output / "base")
    setting = Setting(
        depth=load_model_config(Model(path=base)).get_text_config().num_hidden_layers,
        base=base,
        pretrained=options.model is not None,
        folder=options.output / "cells",
        data=options.output / "data",
        deadline=deadline,
        environment={"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))},
        **{name: getattr(size, name) for name in ("steps", "lr", "supervised", "aligned", "test_rows")},
    )
    announce("the base model's retrieval")
    whatever = replace(setting, deadline=float("inf"))  # nothing can be drawn without it
    measured = probe(options.output / "base_probe.log", whatever, options.output / "base_probe", base)

    cells = order(studies, options.seeds)
    missing = sum(cell.result(setting) is None for cell in cells)
    announce(f"{len(cells)} cells of {len(studies)} studies, {missing} to do, {options.jobs} at a time")
    run_all(cells, setting, options.jobs)
    for study in studies:
        found = findings.collect(study, list(range(1, options.seeds + 1)), setting)
        if found:
            findings.write(study, found, measured, setting, options.output)
            console.print(Markdown((options.output / f"{study.name}.md").read_text()))
    left = sum(cell.result(setting) is None for cell in cells)
    if left:
        say(f"the budget is used up with {left} of {len(cells)} cells to do: the same command goes on")
    say(f"took {(time.monotonic() - start) / 60:.1f} minutes; tables and pictures: {options.output}/*.md, *.png")
    say(f"curves: tensorboard --logdir {setting.folder}")


def order(studies: list[Study], seeds: int) -> list[Cell]:
    """All cells, each once, an arm's parts before it: study by study, and in each seed by seed."""
    cells: dict[Cell, None] = {}
    for study in studies:
        for seed in range(1, seeds + 1):
            for arm in study.arms:
                cell = Cell(arm, seed)
                cells |= dict.fromkeys([*cell.parts(), cell])
    return list(cells)


def _claim(options: argparse.Namespace) -> None:
    """Make the directory; one of another size, model, data or recipe is refused."""
    make_writable(options.output, "output")
    stamp = options.output / "settings.json"
    settings = {"model": options.model, "data": str(options.data.resolve()), "recipe": RECIPE.read_text()}
    text = json.dumps(settings | {"size": asdict(material.SIZES[options.size])}, indent=1) + "\n"
    if not stamp.exists():
        write_whole(stamp, text)
    elif stamp.read_text() != text:
        raise UserError(f"{options.output} holds a study with other settings ({stamp}): choose another --output")


if __name__ == "__main__":
    main()
