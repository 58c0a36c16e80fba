"""COMET scores of translations, by the `comet-score` command of unbabel-comet.

A command and not an import: unbabel-comet 2.2 needs transformers below 5 and numpy below 2, and mlalign needs newer
ones, so it lives in an environment of its own (`pipx install unbabel-comet`). Scores are kept, for they take minutes.
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from mlalign import distributed
from mlalign.durable import write_whole
from mlalign.errors import UserError
from mlalign.predictions import Predictions
from mlalign.rundir import digest


def comet_scores(predictions: Predictions, model: str, kept: Path) -> np.ndarray:
    """A score for each row, [rows]. Args: model: such as Unbabel/wmt22-comet-da; kept: the file they are kept in.

    Raises UserError where `comet-score` is not there or fails.
    """
    texts = {
        "src": [gold["src"] for gold in predictions.golds],
        "mt": predictions.texts,
        "ref": [gold["reference"] for gold in predictions.golds],
    }
    fingerprint = _fingerprint(model, predictions)
    before = _read(kept)
    if before and before["fingerprint"] == fingerprint:
        return np.array(before["scores"])
    command = shutil.which("comet-score")
    if command is None:
        raise UserError("comet needs the command comet-score, which is not on PATH: pipx install unbabel-comet")
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.txt" for name in texts}
        for name, lines in texts.items():
            paths[name].write_text("".join(" ".join(line.split()) + "\n" for line in lines))
        result = Path(folder) / "scores.json"
        gpus = min(torch.cuda.device_count(), 1) if distributed.uses_cuda() else 0
        words = [command, "-s", paths["src"], "-t", paths["mt"], "-r", paths["ref"], "--model", model, "--gpus", gpus]
        done = subprocess.run([*map(str, words), "--to_json", str(result), "--quiet"], capture_output=True, text=True)
        if done.returncode or not result.exists():
            reason = (done.stderr.strip().splitlines() or ["no result"])[-1]
            raise UserError(f"comet-score --model {model} failed: {reason}")
        (rows,) = json.loads(result.read_text()).values()
    scores = [float(row["COMET"]) for row in rows]
    if len(scores) != len(predictions.texts):
        raise UserError(f"comet-score --model {model} gave {len(scores)} scores for {len(predictions.texts)} rows")
    kept.parent.mkdir(exist_ok=True)
    write_whole(kept, json.dumps({"model": model, "fingerprint": fingerprint, "scores": scores}) + "\n")
    return np.array(scores)


def kept_scores(predictions: Predictions, kept: Path) -> tuple[str, np.ndarray] | None:
    """The model and the scores [rows] that an evaluation left in `kept`; None where there are none of these answers."""
    before = _read(kept)
    if before is None or before["fingerprint"] != _fingerprint(before["model"], predictions):
        return None
    return before["model"], np.array(before["scores"])


def _fingerprint(model: str, predictions: Predictions) -> str:
    return digest([model, predictions.texts, predictions.golds])


def _read(kept: Path) -> dict | None:
    try:
        before = json.loads(kept.read_text())
        return before if {"model", "fingerprint", "scores"} <= before.keys() else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{kept} cannot be read as COMET scores, delete it: {error}") from error
