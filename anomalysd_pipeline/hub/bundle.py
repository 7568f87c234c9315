"""One self-contained Python file made from this package's modules, for checkpoints that are loaded without it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from .. import __version__
from .bundle_modules import Module, ModuleGraph

_PACKAGE = Path(__file__).resolve().parents[1]

_HEADER = '''\
"""{package} in one file, for diffusers to load where that package is not installed:

    DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)

Where it is installed, `AnomalySDPipeline.from_pretrained(folder)` does the same and runs no code from the folder.

These are modules of anomalysd-pipeline {version}, joined by its module `bundle`: change them rather than this file.
Needs diffusers 0.42 or newer. Imports {imports}.
License: Apache-2.0.
"""
'''

_LAZY = '''\
def _from_package(module):
    """A module of the package that this file does not hold."""
    try:
        return importlib.import_module(f"{package}.{{module}}".rstrip("."))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "{package}":
            raise
        raise ImportError(
            "This needs more than the published pipeline.py holds: install the package anomalysd-pipeline and load "
            "with `AnomalySDPipeline.from_pretrained`."
        ) from error
'''

_FOOTER = """\
# model_index.json lists these components under the modules of the package. Where it is not installed, this file stands
# for those modules; where it is, the components are its own, so that there is one class of each.
_COMPONENTS = {{
{components}
}}
for _name, _classes in _COMPONENTS.items():
    try:
        _module = importlib.import_module(_name)
    except ModuleNotFoundError:
        _module = None
    if _module is None or _module.__name__ != _name:
        sys.modules[_name] = sys.modules[__name__]
        for _class in _classes:
            _class.__module__ = _name
    else:
        globals().update({{_class.__name__: getattr(_module, _class.__name__) for _class in _classes}})
"""

_COMPONENT = '''\
"""Components of this checkpoint. Their code is in pipeline.py, which diffusers runs first."""

import sys

_module = sys.modules["{module}"]
{names}
'''


def bundle_source(package: Path = _PACKAGE, entry: str = "pipeline") -> str:
    """Joins a module and all it imports from its package, at the top of its modules, into the source of one file.

    Comments and formatting stay. Names that two modules use for different things are told apart by the module's name.
    Modules that are imported inside functions alone are left out: there the file asks for the installed package. Where
    the package is missing, the file takes the place of the modules whose classes model_index.json lists.

    Args:
        package: folder of the package.
        entry: the module to start from.

    Returns:
        Python source, the same for the same modules.

    Raises:
        ValueError: if modules import each other in a circle, or hold a construct that cannot be joined.
    """
    graph = ModuleGraph(Path(package), entry)
    body = "\n\n".join(filter(None, (_Section(graph, module).text() for module in graph.modules.values())))
    helpers = set()
    if "_from_package(" in body:
        helpers.add("importlib")
        body = f"{_LAZY.format(package=graph.package.name)}\n\n{body}"
    if graph.components():
        helpers |= {"importlib", "sys"}
        lines = [f'    "{module}": ({", ".join(names)},),' for module, names in graph.components().items()]
        body = f"{body}\n\n{_FOOTER.format(components=chr(10).join(lines))}"
    imported = ", ".join(sorted(_distributions(graph), key=str.lower)) or "nothing else"
    header = _HEADER.format(package=graph.package.name, version=__version__, imports=imported)
    return f"{header}\nfrom __future__ import annotations\n\n{_imports(graph, helpers)}\n\n\n{body}"


def component_sources(package: Path = _PACKAGE, entry: str = "pipeline") -> dict[str, str]:
    """For each module with components, "package.module", the source of a file that takes them from the bundle.

    On the Hub, diffusers wants the code of a component to lie in the component's folder.
    """
    return {
        module: _COMPONENT.format(module=module, names="\n".join(f"{name} = _module.{name}" for name in names))
        for module, names in ModuleGraph(Path(package), entry).components().items()
    }


def _distributions(graph: ModuleGraph) -> set[str]:
    """Top-level names of all that is imported anywhere, inside functions too, but for the standard library."""
    found = set()
    for module in graph.modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def _imports(graph: ModuleGraph, helpers: set[str]) -> str:
    """The imports of all modules, the standard library's first; `helpers`: modules that the added parts use."""
    plain = {(helper, f"import {helper}") for helper in helpers}
    parts: dict[str, set[str]] = {}
    for module in graph.modules.values():
        for entity in module.external.values():
            name = graph.names[entity]
            dotted = [d for d in module.dotted if d.split(".")[0] == entity.where]
            if entity.attribute is not None:
                suffix = "" if name == entity.attribute else f" as {name}"
                parts.setdefault(entity.where, set()).add(f"{entity.attribute}{suffix}")
            elif name == entity.where:
                plain |= {(d, f"import {d}") for d in dotted}
            elif any(d != entity.where for d in dotted):
                raise module.refuse(f"has `import {max(dotted)}`, a name that another module uses")
            else:
                plain.add((entity.where, f"import {entity.where} as {name}"))
    lines = sorted(plain) + sorted((m, f"from {m} import {', '.join(sorted(p))}") for m, p in parts.items())
    groups = [
        [line for where, line in lines if (where.split(".")[0] in sys.stdlib_module_names) == standard]
        for standard in (True, False)
    ]
    return "\n\n".join("\n".join(group) for group in groups if group)


class _Section:
    """The source of one module with its imports cut out and its names replaced; comments and formatting stay."""

    def __init__(self, graph: ModuleGraph, module: Module):
        self.graph, self.module = graph, module
        self.starts = [0]
        for line in module.source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def text(self) -> str:
        """Empty if nothing is left of the module."""
        removals = [(self.starts[s.lineno - 1], self.starts[s.end_lineno], "") for s in self.module.removed]
        source = self.module.source
        for start, end, text in sorted([*removals, *self._renames(), *self._lazy_imports()], reverse=True):
            source = source[:start] + text.encode() + source[end:]
        code = re.sub(r"\n{4,}", "\n\n\n", source.decode()).strip()
        if not code:
            return ""
        title = f"{self.graph.package.name}/{self.module.path.relative_to(self.graph.package).as_posix()}"
        comment = [title, "-" * len(title), *self.module.comment.splitlines()]
        return "\n".join([*(f"# {line}".rstrip() for line in comment), "", code, ""])

    def _span(self, node: ast.AST) -> tuple[int, int]:
        """Where a node starts and ends, in bytes."""
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def _renames(self) -> list[tuple[int, int, str]]:
        edits, texts = [], {}
        renamed: dict[str, str] = {}
        positioned = set()
        for occurrence in self.module.occurrences:
            new = self.graph.names[self.graph.entity(self.module, occurrence.name)]
            if new == occurrence.name:
                continue
            renamed[occurrence.name] = new
            start, end = self._span(occurrence.node)
            if occurrence.text is not None:
                occurrence.node.id = new
                texts[self._span(occurrence.text)] = occurrence.text
                continue
            if not isinstance(occurrence.node, ast.Name):  # a definition, whose name has no node of its own
                start = re.compile(rb"(async\s+)?(def|class)\s+").match(self.module.source, start).end()
                end = start + len(occurrence.name.encode())
            if not isinstance(getattr(occurrence.node, "ctx", None), ast.Load):
                positioned.add(occurrence.name)
            edits.append((start, end, new))
        lost = sorted((renamed.keys() & self.module.defined) - positioned)
        if lost:
            raise self.module.refuse(f"binds {lost[0]!r}, a name that another module uses, in an import or a handler")
        for node in ast.walk(ast.Module(self.module.kept, [])):
            if isinstance(node, ast.Global) and renamed.keys() & set(node.names):
                edits.append((*self._span(node), f"global {', '.join(renamed.get(n, n) for n in node.names)}"))
        return edits + [(*span, ast.unparse(text)) for span, text in texts.items()]

    def _lazy_imports(self) -> list[tuple[int, int, str]]:
        """Imports of our modules inside functions: from this file where they are in it, else from the package."""
        edits = []
        for node in ast.walk(ast.Module(self.module.kept, [])):
            if not (isinstance(node, ast.ImportFrom) and node.level):
                continue
            where = self.graph.absolute(self.module.name, node)
            lines = []
            for alias in node.names:
                local, whole = alias.asname or alias.name, f"{where}.{alias.name}".lstrip(".")
                if self.graph.path(whole):
                    lines.append(f'{local} = _from_package("{whole}")')
                elif where and where in self.graph.modules:
                    known = self.graph.names[self.graph.entity(self.graph.modules[where], alias.name)]
                    lines += [] if known == local else [f"{local} = {known}"]
                else:
                    lines.append(f'{local} = _from_package("{where}").{alias.name}')
            edits.append((*self._span(node), f"\n{' ' * node.col_offset}".join(lines or ["pass"])))
        return edits
