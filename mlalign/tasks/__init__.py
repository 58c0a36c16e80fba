"""Tasks that `mlalign evaluate` can score, by name: one module each with `score(predictions, references)`."""

from mlalign.tasks import slot_filling

TASKS = {"slot_filling": slot_filling}
