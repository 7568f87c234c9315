"""The direction of imports between rooms, read from the source; see CONTRIBUTING.md."""

import ast
from pathlib import Path

import diffusers
import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "anomalysd_pipeline"
LEVELS = (
    ("common",),
    ("synthetic",),
    ("data",),
    ("method",),
    ("models",),
    ("adaptation",),
    ("knowledge",),
    ("output",),
    ("mixins",),
    ("pipeline",),
    ("inspection",),
    ("training", "evaluation"),
    ("app",),
    ("detect", "train", "evaluate"),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
SHIMS = ("adapters", "prototypes", "scoring")
MODULES = sorted(PACKAGE.rglob("*.py"))
LAZY_ONLY = "hub"
"""Imported inside functions alone: publishing is asked for by few."""


def name_of(path: Path) -> str:
    """Dotted name within the package, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path):
    """(module of ours, whether at the top) of each import, those under `TYPE_CHECKING` and in functions included."""
    own = path.relative_to(PACKAGE).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for kind in ast.walk(tree) if isinstance(kind, ast.FunctionDef) for node in ast.walk(kind)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = ".".join([*own[: len(own) - node.level + 1], *filter(None, [node.module])])
        for alias in node.names:
            whole = f"{base}.{alias.name}".lstrip(".")
            is_module = (PACKAGE / whole.replace(".", "/")).is_dir() or (
                PACKAGE / f"{whole.replace('.', '/')}.py"
            ).is_file()
            yield (whole if is_module else base), id(node) not in inside


# The package itself and the old names of components lead to everything.
@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path) not in ("", *SHIMS)], ids=name_of)
def test_left_never_imports_right(path):
    own = name_of(path).partition(".")[0]
    for module, at_top in imports(path):
        room = module.partition(".")[0]
        if LAZY_ONLY in (room, own):
            assert own in (room, LAZY_ONLY) or not at_top, f"{module} belongs inside a function"
        elif room:
            assert LEVEL[room] <= LEVEL[own], f"{name_of(path)} imports {module}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name_of(path): {module for module, _ in imports(path)} - {name_of(path)} for path in MODULES}
    graph[""] = set()  # its constants are for all; what it offers is imported when it is asked for
    left = dict(graph)
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


def test_nothing_below_the_pipeline_names_its_class():
    below = [path for path in MODULES if LEVEL.get(name_of(path).partition(".")[0], 99) < LEVEL["pipeline"]]
    named = [
        name_of(path)
        for path in below
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Name, ast.Attribute))
        and "AnomalySDPipeline" in (getattr(node, "id", ""), getattr(node, "attr", ""))
    ]
    assert len(below) > 30 and not named


def test_no_file_has_a_second_subject():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name for name, length in lengths.items() if length > 500} <= {"pipeline"}
    assert lengths["pipeline"] <= 620
    assert all(lengths[door] <= 60 for door in ("detect", "train", "evaluate"))


def test_rooms_are_not_taken_for_pipelines_of_diffusers():
    """diffusers saves a component of `x.models.y` under "models" where it has pipelines of that name itself."""
    assert not hasattr(diffusers.pipelines, "models")
