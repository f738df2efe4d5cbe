"""What may import what: each part of the package only those below it."""

import ast
from pathlib import Path

import pytest

import invertible

ROOT = Path(invertible.__file__).parent
# From below.
PARTS = [
    "state",
    "_support",
    "module",
    "direction",
    "exact",
    "checkpointing",
    "composition",
    "layers",
    "densities",
    "testing",
]
# And within the engine.
ENGINE = [
    *(
        "settings",
        "policies",
        "plan",
        "plans",
        "attributes",
        "ambient",
        "buffers",
        "circumstances",
        "contexts",
        "replay",
    ),
    *("samples", "comparison", "operations", "frame", "norms", "drift", "constants", "chain"),
    *("hooks", "allocations", "follow", "graph_checks", "graph_chain", "graph", "run", "memory"),
]
FILES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[tuple[str, ...]]:
    """What a file imports from the package, as paths below it; not for type checkers alone."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level]
            names = node.module.split(".") if node.module else [node.names[0].name]
            found.add((*base, *names))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_what_is_below_it(path):
    part, *rest = path.relative_to(ROOT).with_suffix("").parts
    if part == "__init__":
        return
    for imported in imports(path):
        assert PARTS.index(imported[0]) <= PARTS.index(part), imported
        if part == imported[0] == "checkpointing" and rest[0] in ENGINE:
            assert ENGINE.index(imported[1]) < ENGINE.index(rest[0]), imported
