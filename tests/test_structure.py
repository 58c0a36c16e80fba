"""Imports go one way, files stay readable, and the pure modules are pure."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlalign"

#: Every module of a row may import from the rows above it and not from its own.
LAYERS = [
    {"errors", "loss", "pooling", "retrieval", "plots", "languages", "demo_data", "base_model"}
    | {"tasks.prompts", "sifting", "corpora", "jobs", "kernels", "prefetch", "durable"},
    {"launchers", "hostile", "scoring"},
    {"config", "distributed", "tasks", "tasks.slot_filling", "tasks.translation"},
    {"tracker"},
    {
        "zero",
        "rundir",
        "schedule",
        "rows",
        "head",
        "traits",
        "tasks.items",
        "tasks.json_extraction",
        "memory",
        "examples",
        "resharding",
        "watchdog",
        "varlen",
    },
    {
        "guards",
        "data",
        "collate",
        "sampler",
        "model",
        "checkpoint",
        "merging",
        "predictions",
        "corpora.item",
        "token_cache",
    },
    {"compiling"},
    {
        "objectives",
        "merged_config",
        "dataset",
        "sharding",
        "parallel",
        "checks",
        "generation",
        "report",
        "comet",
        "sieve",
    }
    | {f"corpora.{name}" for name in ("massive", "translation", "uner", "bitext", "against")},
    {"evaluation", "states", "probe_report", "workload", "loader", "gradients"},
    {"probe_show", "activations", "packing", "progress"},
    {"estimate"},
    {f"commands.{path.stem}" for path in (PACKAGE / "commands").glob("[!_]*.py")} - {"commands.merge", "commands.plan"},
    {"commands.merge", "commands.plan"},  # which tunes its weight by evaluating, and measures by training
    {"verbs"},
    {"__main__"},
]
PURE = {"loss", "pooling", "retrieval", "languages", "tasks.prompts", "sifting", "jobs", "kernels", "memory", "durable"}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name not in ("", "commands"):
            found[name] = path
    return found


def imported(path: Path) -> set[str]:
    """Our modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mlalign":
            base = node.module.removeprefix("mlalign").lstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                names.add(full if full in modules() else base)
    return names - {""}


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_one_way(name):
    row = next(number for number, layer in enumerate(LAYERS) if name in layer)
    allowed = set().union(*LAYERS[:row])
    assert imported(modules()[name]) <= allowed


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_import_nothing_of_ours(name):
    assert imported(modules()[name]) == set()


@pytest.mark.parametrize("name", sorted(set(modules()) - {"demo_data"}))
def test_files_can_be_read_in_one_sitting(name):
    assert len(modules()[name].read_text().splitlines()) < 420


def test_public_things_say_what_they_are():
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), name
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                trivial = isinstance(node, ast.FunctionDef) and len(node.body) == 1
                settings = name == "config" and isinstance(node, ast.ClassDef)
                assert ast.get_docstring(node) or trivial or settings, f"{name}.{node.name}"
