"""Translation: BLEU and chrF++ by sacrebleu, the share of answers in a wrong language, and COMET where asked for.

`lang` of a row is its direction, such as `en-cs`.
"""

import numpy as np
import py3langid
from langcodes import Language, standardize_tag
from langcodes.tag_parser import LanguageTagError
from sacrebleu.metrics import BLEU, CHRF

from mlalign.errors import UserError
from mlalign.languages import language_of
from mlalign.tasks.prompts import task_row

MAIN = "chrf++"
LOWER_IS_BETTER = ("off_target",)

#: sacrebleu's tokenizers for languages that put no spaces between words; elsewhere it is 13a.
_TOKENIZERS = dict.fromkeys(("zh", "yue", "wuu"), "zh") | dict.fromkeys(("ja", "th", "km", "lo", "my", "bo"), "char")


_VARIETIES = ({"no", "nb", "nn"}, {"zh", "wuu", "yue"}, {"ar", "arz", "ary"})


def language_name(code: str) -> str:
    """`cs` -> `Czech`, `zho_Hans` -> `Chinese (Simplified)`. Raises ValueError for what is not a language code."""
    try:
        language = Language.get(standardize_tag(code, macro=True))
    except LanguageTagError:
        language = None
    if language is None or not language.is_valid():
        raise ValueError(f"{code!r} is not the code of a language")
    return Language.make(language=language.language, script=language.script).display_name("en")


def row(src: str, tgt: str, src_lang: str, tgt_lang: str, form: str) -> dict:
    """A task row's prompt and answer, in the paper's words. Args: form: `prompts.FORMS`.

    Raises ValueError for an unknown language code.
    """
    instruction = f"Translate the following sentences from {language_name(src_lang)} to {language_name(tgt_lang)}."
    return task_row(form, instruction, f"{instruction}\n{src}\nTranslation:", src, tgt)


def gold(row: dict, answer: str, where: str) -> dict:
    """What scoring needs of a test row: source, reference and the target language. Raises UserError without them."""
    for name in ("src", "tgt_lang"):
        if not isinstance(row.get(name), str):
            raise UserError(
                f"{where}: no text in field {name!r}, which a translation is scored with: `mlalign prepare "
                "translation` writes it"
            )
    if not answer:
        raise UserError(f"{where}: the reference translation is empty")
    return {"src": row["src"], "reference": answer, "tgt_lang": row["tgt_lang"]}


def statistics(predictions: list[str], golds: list[dict], language: str) -> dict[str, np.ndarray]:
    """Per row: sacrebleu's n-gram counts for BLEU [rows, 10] and chrF++ [rows, 24], and `off_target` [rows].

    An empty answer is off target; where py3langid does not know the target language, there is no `off_target`.
    Raises ValueError where the rows have several target languages: each is scored in its own way.
    """
    targets = sorted({each["tgt_lang"] for each in golds})
    if len(targets) > 1:
        raise ValueError(
            f"{language} has rows of several target languages, {', '.join(targets)}: set lang to a direction"
        )
    target = targets[0]
    references = [[each["reference"] for each in golds]]
    counts = {
        # sacrebleu keeps counts per sentence behind an underscore; its own significance test uses the same calls
        "bleu": np.array(_bleu(target)._extract_corpus_statistics(predictions, references), dtype=float),
        "chrf++": np.array(_chrf()._extract_corpus_statistics(predictions, references), dtype=float),
    }
    accepted = _labels(target)
    if accepted:
        astray = [not text.strip() or py3langid.classify(text)[0] not in accepted for text in predictions]
        counts["off_target"] = np.array(astray, dtype=float)
    return counts


def _labels(target: str) -> set[str]:
    """py3langid's labels for texts in the target language, and in close varieties, which it cannot tell apart."""
    code = language_of(target)
    near = next((group for group in _VARIETIES if code in group), {code})
    return {label for label, _ in py3langid.rank("a") if language_of(label) in near}


def metrics(totals: dict[str, np.ndarray], rows: int | np.ndarray) -> dict[str, np.ndarray]:
    """Metrics from sums of `statistics` over rows; every value may be an array of many such sums.

    `bleu` and `chrf++` are percent, as sacrebleu gives them; `comet`, where there is such a column, is its mean.
    """
    scores = {
        "chrf++": _each(_chrf(), totals["chrf++"]),
        "bleu": _each(_bleu("en"), totals["bleu"]),  # from counts on, no tokenizer is asked
    }
    return scores | {name: totals[name] / rows for name in ("off_target", "comet") if name in totals}


def describe(language: str, golds: list[dict]) -> dict[str, str]:
    """sacrebleu's signatures, for the report."""
    signatures = {"bleu": _bleu(golds[0]["tgt_lang"]), "chrf++": _chrf()}
    described = {}
    for name, metric in signatures.items():
        metric.corpus_score(["a"], [["a"]])  # a signature knows its number of references after a first use
        described[name] = str(metric.get_signature())
    return described | {"off_target": "share of answers that py3langid takes for another language"}


def _bleu(target: str) -> BLEU:
    return BLEU(tokenize=_TOKENIZERS.get(language_of(target), "13a"))


def _chrf() -> CHRF:
    return CHRF(word_order=2)


def _each(metric: BLEU | CHRF, totals: np.ndarray) -> np.ndarray:
    """Scores of one row of counts [counts] or of many [samples, counts]."""
    rows = np.atleast_2d(totals).round().astype(int).tolist()
    scores = np.array([metric._compute_score_from_stats(row).score for row in rows])
    return scores if totals.ndim == 2 else scores[0]
