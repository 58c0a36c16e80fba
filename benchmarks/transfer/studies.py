"""What is compared: a study is a list of arms, an arm a few changes to recipe.yaml.

Arms that several studies share are trained once.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Task:
    """What is answered, and how answers are scored; material.py makes its rows, in a folder of its name."""

    name: str
    scorer: str  #: of `mlalign evaluate --task`
    metric: str  #: of its scores
    max_new_tokens: int
    corpus: str = "massive"  #: which the base model must have read
    supervised: tuple[str, ...] | None = None  #: languages or directions; None = those of the size
    aligned: tuple[str, ...] | None = None


#: Answers that carry over in a tiny model: an intent and slot types, the same in every language.
TYPES = Task("types", "items", "f1", 16)
#: The paper's, with words of the utterance.
WORDS = Task("words", "slot_filling", "f1", 48)
JSON = Task("json", "json_extraction", "f1", 96, "uner", ("en",), ("da", "hr", "pt", "sk", "sv", "zh"))
TRANSLATION = Task("translation", "translation", "chrf++", 80, "mt", ("de-en", "en-de"), ("cs", "is", "ru", "zh"))


@dataclass(frozen=True)
class Arm:
    """One way to train. What {data}, {twice}, {quarter} and such stand for in a change: `cells._overrides`."""

    name: str
    changes: tuple[str, ...] = ()  #: overrides of recipe.yaml, as on the command line
    adapter: bool = False  #: LoRA, whatever other arms are
    parts: tuple["Arm", "Arm"] | None = None  #: merged from a task adapter and an alignment adapter
    merge: str = "auto"  #: the merge weight, or auto: tuned on dev rows of the supervised languages
    x: str | None = field(default=None, compare=False)  #: its place on the axis of its study's curve
    task: Task = TYPES


@dataclass(frozen=True)
class Study:
    """Arms side by side; the first is what the others are compared with."""

    name: str
    title: str
    arms: tuple[Arm, ...]
    axis: str | None = None  #: label of `Arm.x`; None = bars

    @property
    def metric(self) -> str:
        """What all arms are scored by, in words."""
        return {"f1": "F1", "chrf++": "chrF++"}[self.arms[0].task.metric]


def _bitext(name: str, languages: str = "*") -> tuple[str, ...]:
    return tuple(f"alignment.{split}=[{{data}}/{name}/{split}.{languages}.jsonl]" for split in ("train", "dev"))


PAIRS = (50, 200, 1000)  #: of each language, beside all there are
MERGE_WEIGHTS = ("0.2", "0.3", "0.4")  #: beside halves
LANGUAGES = (1, 3)  #: in the bitext, beside all there are

NO_ALIGNMENT = ("alignment=null", "interleave.ratio=1:0")

#: As the paper's code: one objective per micro-batch, InfoNCE one way, negatives of the micro-batch only. A step holds
#: as many rows and pairs as one of ours, and the loss has our weight.
AUTHORS = (
    "task.batch_size=16",
    "task.micro_batch_size=16",
    "alignment.batch_size=32",
    "alignment.micro_batch_size=32",
    "alignment.infonce=one_way",
    "alignment.negatives=local",
    "alignment.positives=pair",
    "interleave.mode=micro_batch",
    "interleave.micro_batches=4",
)

_MODULES = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,lm_head"
#: Without the LM head a model as small as those made here hardly learns the task by LoRA.
SMALL_ADAPTERS = (f"lora={{r: 64, alpha: 128, dropout: 0.0, target_modules: [{_MODULES}]}}", "optimizer.lr=3e-3")
#: The paper's, for a model that others have pretrained: of such a one every arm is an adapter.
PAPER_ADAPTERS = ("lora={r: 8, alpha: 16, dropout: 0.1}", "optimizer.lr=5e-4")

TASK_ONLY = Arm("task only", NO_ALIGNMENT)
ALIGNED = Arm("aligned")
TATOEBA = Arm("aligned, Tatoeba", _bitext("tatoeba"))
PAPER = Arm("authors' objective", AUTHORS)
TASK_ADAPTER = Arm("task adapter", NO_ALIGNMENT, adapter=True)
JOINT_ADAPTER = Arm("joint adapter", adapter=True)
ALIGNMENT_ADAPTER = Arm("alignment adapter", ("task=null", "interleave.ratio=0:1"), adapter=True)
MERGED = Arm("merged, tuned", parts=(TASK_ADAPTER, ALIGNMENT_ADAPTER))
HALVES = Arm("merged, halves", parts=(TASK_ADAPTER, ALIGNMENT_ADAPTER), merge="0.5")


def _local(pairs: int) -> Arm:
    """As on 64 / `pairs` ranks, each of which contrasts its own pairs alone."""
    changes = (f"alignment.micro_batch_size={pairs}", "alignment.negatives=local")
    return Arm(f"local, {64 // pairs} x {pairs}", changes)


def _weight(weight: float) -> Arm:
    """The recipe's own is the arm that other studies have too; so is it in `_batch`."""
    if weight == 0.1:
        return Arm(ALIGNED.name, x=f"{weight:g}")
    return Arm(f"weight {weight:g}", (f"alignment.weight={weight:g}",), x=f"{weight:g}")


def _batch(pairs: int) -> Arm:
    if pairs == 64:
        return Arm(ALIGNED.name, x=str(pairs))
    changes = (f"alignment.batch_size={pairs}", f"alignment.micro_batch_size={min(pairs, 64)}")
    return Arm(f"batch {pairs}", changes, x=str(pairs))


def _task_and_bitext(task: Task) -> tuple[Arm, ...]:
    """The main comparison on another task, aligned on Tatoeba."""
    long = "task.max_length=256"
    return (
        Arm(f"task only, {task.name}", (*NO_ALIGNMENT, long), task=task),
        Arm(f"aligned, {task.name}", (*_bitext(f"tatoeba-{task.name}"), long), task=task),
    )


STUDIES = {
    study.name: study
    for study in (
        Study("main", "The task alone, and aligned", (TASK_ONLY, ALIGNED, TATOEBA, PAPER)),
        Study("brief", "The task alone, and aligned, no more arms", (TASK_ONLY, ALIGNED)),
        Study(
            "merged", "Adapters: trained together, or apart and merged", (TASK_ADAPTER, JOINT_ADAPTER, MERGED, HALVES)
        ),
        Study(
            "merge_weight",
            "The weight of the alignment adapter in a merged one",
            (
                Arm(TASK_ADAPTER.name, NO_ALIGNMENT, adapter=True, x="0"),
                *(Arm(f"merged, {weight}", parts=MERGED.parts, merge=weight, x=weight) for weight in MERGE_WEIGHTS),
                Arm(HALVES.name, parts=HALVES.parts, merge="0.5", x="0.5"),
            ),
            "merge weight",
        ),
        Study(
            "layer",
            "The layer of alignment",
            (
                Arm("layer 1", ("alignment.layer=1",), x="1"),
                Arm("layer at a quarter", ("alignment.layer={quarter}",), x="L/4"),
                Arm(ALIGNED.name, x="L/2"),
                Arm("layer at three quarters", ("alignment.layer={three_quarters}",), x="3L/4"),
                Arm("last layer", ("alignment.layer={depth}",), x="L"),
            ),
            "layer, of L",
        ),
        Study(
            "weight",
            "The weight of alignment",
            (
                Arm(TASK_ONLY.name, NO_ALIGNMENT, x="0"),
                *map(_weight, (0.03, 0.1, 0.3, 1, 3)),
            ),
            "weight",
        ),
        Study(
            "batch",
            "Pairs of a batch",
            (
                *map(_batch, (8, 32, 64, 256)),
                Arm("batch 256, local", (*_batch(256).changes, "alignment.negatives=local"), x="256 as\n4 x 64"),
            ),
            "pairs of a batch",
        ),
        Study(
            "pairs",
            "How much bitext",
            (
                Arm(TASK_ONLY.name, NO_ALIGNMENT, x="0"),
                *(Arm(f"{pairs} pairs", _bitext(f"massive-pairs-{pairs}"), x=str(pairs)) for pairs in PAIRS),
                Arm(ALIGNED.name, x="all"),
            ),
            "pairs of a language",
        ),
        Study(
            "languages",
            "How many languages are aligned",
            (
                Arm(TASK_ONLY.name, NO_ALIGNMENT, x="0"),
                *(Arm(f"{n} aligned", _bitext(f"massive-languages-{n}"), x=str(n)) for n in LANGUAGES),
                Arm(ALIGNED.name, x="all"),
            ),
            "languages in the bitext",
        ),
        Study(
            "negatives",
            "Which pairs are negatives of which",
            (
                ALIGNED,
                _local(32),
                _local(16),
                Arm("positives by pair", ("alignment.positives=pair",)),
                Arm("one way", ("alignment.infonce=one_way",)),
            ),
        ),
        Study(
            "cost",
            "The same compute",
            (
                TASK_ONLY,
                Arm("task only, twice the steps", (*NO_ALIGNMENT, "optimizer.steps={twice}")),
                ALIGNED,
                Arm("aligned, half the steps", ("optimizer.steps={half}",)),
            ),
        ),
        Study(
            "words",
            "Answers in words of the utterance, as in the paper",
            (Arm("task only, words", NO_ALIGNMENT, task=WORDS), Arm("aligned, words", task=WORDS)),
        ),
        Study("json", "JSON extraction", _task_and_bitext(JSON)),
        Study("translation", "Translation", _task_and_bitext(TRANSLATION)),
    )
}
