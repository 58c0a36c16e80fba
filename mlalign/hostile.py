"""Untrusted input: secrets in configs, YAML bombs, names that escape a directory."""

import os
import re
from pathlib import Path

import yaml

from mlalign.errors import UserError

_MOST_NODES = 100_000  #: that a config may expand to

_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{30,}|sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_\w{30,}|AKIA[0-9A-Z]{16})"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?<=[?&])(?:token|api_key|sig|password|secret|X-Amz-Signature)=[^&\s]+"
)
_NAMES_OF_SECRETS = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY)$", re.IGNORECASE)
_SHORTEST = 16  #: characters of an environment variable's value that no path holds by chance


def redacted(text: str) -> str:
    """The text, with `***` in place of what looks like a secret."""
    for value in _secret_values():
        text = text.replace(value, "***")
    return _SECRET.sub("***", text)


def refuse_secrets(values: dict[str, object], where: str) -> None:
    """Raise UserError, naming the key and not the value, if a value holds what looks like a secret."""
    for key, value in values.items():
        if redacted(str(value)) != str(value) or redacted(key) != key:
            raise UserError(
                f"{where}: {redacted(key)} holds what looks like a token or password, and configs are kept and shown: "
                "leave it out, and set HF_TOKEN or the like in the environment"
            )


def _secret_values() -> list[str]:
    """Values in this process's environment whose names say that they are secrets."""
    named = (value for name, value in os.environ.items() if _NAMES_OF_SECRETS.search(name))
    return [value for value in named if len(value) >= _SHORTEST and not os.path.exists(value)]


def refuse_bomb(path: Path) -> None:
    """Raise UserError for YAML whose aliases expand to more than memory holds. Raises what PyYAML and reading raise."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        sizes[id(node)] = _MOST_NODES + 1  # of a node that contains itself
        children = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        sizes[id(node)] = 1 + sum(map(size, children))
        return sizes[id(node)]

    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    try:
        nodes = 0 if root is None else size(root)
    except RecursionError:
        nodes = _MOST_NODES + 1
    if nodes > _MOST_NODES:
        raise UserError(f"config {path} expands to more than {_MOST_NODES:,} values: write it without so many aliases")


def checked_name(name: str, where: str) -> str:
    """A language's name, unchanged. Raises UserError for one that cannot be part of a file's name, or be printed.

    Languages name result files, lines of reports and curves.
    """
    if not name or len(name) > 100 or name.startswith(".") or not name.isprintable() or set(name) & set("/\\"):
        raise UserError(f"{where}: {name[:100]!r} cannot be a language's name: use a code such as de or deu_Latn")
    return name
