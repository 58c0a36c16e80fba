"""What is known about a language from its code: resource level and script, and the groups that follow.

Codes may be of any kind: `eng_Latn`, `eng`, `en`, `en-US`; langcodes maps them onto each other.
"""

from langcodes import Language, standardize_tag
from langcodes.tag_parser import LanguageTagError

#: Class of Joshi et al. 2020, "The State and Fate of Linguistic Diversity and Inclusion in the NLP World": from 5, the
#: languages with most labelled and unlabelled data, to 0. From https://microsoft.github.io/linguisticdiversity/
#: (lang2tax.txt), for languages of FLORES, NTREX, Tatoeba and MASSIVE; two-letter codes where there are.
_CLASSES = {
    5: "ar de en es fr ja zh",
    4: "ca cs eu fa fi hi hr hu it ko nl pl pt ru sr sv tr vi",
    3: "af arz be bg bn bs ceb da el et fil gl he id ka kk la lt lv ms ro sk sl ta th uk ur uz",
    2: "am ga ha ht is lo mr mt pa sa sw ti tn wo xh yo zu",
    1: "ak as az ba bm bo br cy eo gu hy ig jv kn km ki ku ky lb ln mg mi mk ml mn my nb ne nn no oc om or qu rw "
    "sc sd sm so sq ss su te tg tpi ts tt ug yi",
    0: "bem dyu fon kac kam kbp kea lua luo lus mos nso nus ps rn si st umb war",
}
_CLASS_OF = {code: level for level, codes in _CLASSES.items() for code in codes.split()}

_LATIN = "Latn"


def language_of(code: str) -> str:
    """The language alone, in its shortest code: `deu_Latn`, `de-DE` and `de` are all `de`; what is no code stays."""
    try:
        return Language.get(standardize_tag(code, macro=True)).language or code
    except LanguageTagError:
        return code


def script_of(code: str) -> str | None:
    """ISO 15924 script: the one in the code, else the one the language is mostly written in; None for no language."""
    try:
        tag = Language.get(standardize_tag(code, macro=True))
    except LanguageTagError:
        return None
    return tag.script or (tag.maximize().script if tag.is_valid() else None)


def resource_class(code: str) -> int | None:
    """Class of Joshi et al. 2020, from 0 to 5; None for a language that the table lacks."""
    return _CLASS_OF.get(language_of(code))


def groups(codes: list[str]) -> dict[str, list[str]]:
    """`high-resource` (classes 3 to 5), `low-resource` (0 to 2), `Latin` and `non-Latin`; without empty ones."""
    members: dict[str, list[str]] = {"high-resource": [], "low-resource": [], "Latin": [], "non-Latin": []}
    for code in codes:
        level, script = resource_class(code), script_of(code)
        if level is not None:
            members["high-resource" if level >= 3 else "low-resource"].append(code)
        if script is not None:
            members["Latin" if script == _LATIN else "non-Latin"].append(code)
    return {name: languages for name, languages in members.items() if languages}
