"""Writes docs/architecture.md from the code: `python -m tests.infra.architecture`.

The diagram has a box for each folder (and for each module beside the folders) and an arrow where one imports another,
lazy imports included. Arrows that follow from others are left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import grimp
import networkx as nx

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
ROOTS = ("infra.box", "flows", "filters", "sdtrain")
_HEAD = """# Architecture

<!-- Written by `python -m tests.infra.architecture`; a test compares. -->

An arrow goes from a folder to one that it imports, and none goes back: there is no cycle between folders, lazy imports
included. Arrows that follow from others are left out. `lint-imports` holds every import to the layers in
`pyproject.toml`. The [tour](tour.md) leads through the code from a metadata row to a sampled image.

"""


def node_of(module: str) -> str:
    """The folder directly below a root that holds the module, or the module itself where it lies beside these."""
    root = next(root for root in ROOTS if module == root or module.startswith(f"{root}."))
    below = module.removeprefix(root).strip(".").split(".")[0]
    return root if root == "infra.box" or not below else f"{root}.{below}"


@lru_cache
def imports() -> nx.DiGraph:
    """The boxes, with an edge from each to those that it imports."""
    found = grimp.build_graph(*ROOTS)
    graph = nx.DiGraph()
    for module in sorted(found.modules):
        for imported in sorted(found.find_modules_directly_imported_by(module)):
            ends = node_of(module), node_of(imported)
            if ends[0] != ends[1]:
                graph.add_edge(*ends)
    return graph


def cycles() -> list[list[str]]:
    """Groups of boxes that import one another."""
    return [sorted(group) for group in nx.strongly_connected_components(imports()) if len(group) > 1]


def diagram() -> str:
    """Mermaid, the longest paths from top to bottom."""
    graph = nx.transitive_reduction(imports())
    lines = ["```mermaid", "flowchart TD"]
    for root in ROOTS:
        boxes = sorted(node for node in graph if node == root or node.startswith(f"{root}."))
        lines += [f'  subgraph "{_path(root)}"', *(f'    {_id(box)}["{_label(box, root)}"]' for box in boxes), "  end"]
    lines += [f"  {_id(above)} --> {_id(below)}" for above, below in sorted(graph.edges)]
    return "\n".join([*lines, "```"])


def _id(box: str) -> str:
    return box.replace(".", "_")


def _path(module: str) -> str:
    path = module.replace(".", "/")
    return f"{path}/" if (ROOT / path).is_dir() else f"{path}.py"


def _label(box: str, root: str) -> str:
    return _path(box).removeprefix(_path(root)) or _path(root)


def folders() -> Iterator[tuple[str, str, int]]:
    """Each folder of code with the sentence of its `__init__.py` and its number of modules."""
    for root in ROOTS:
        for init in sorted((ROOT / root.replace(".", "/")).rglob("__init__.py")):
            sentence = (ast.get_docstring(ast.parse(init.read_text())) or "").split("\n")[0]
            folder = init.parent
            yield f"{folder.relative_to(ROOT)}/", sentence, len(list(folder.glob("*.py"))) - 1


def page() -> str:
    rows = [f"| `{folder}` | {sentence} | {num or ''} |" for folder, sentence, num in folders()]
    table = "\n".join(["| folder | | modules |", "|---|---|---|", *rows])
    return f"{_HEAD}{diagram()}\n\n## Folders\n\n{table}\n"


if __name__ == "__main__":
    PAGE.write_text(page())
