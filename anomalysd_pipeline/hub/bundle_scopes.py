"""Which names of a module's source are global to the module: what `bundle` may rename, and where."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Occurrence:
    """A place at which a global name stands.

    name: the name.
    node: the `Name`, or the function or class definition that binds it.
    local: names bound by the functions around it, which a replacement must not be.
    text: the f-string that it stands in, or None; the positions of parts of an f-string depend on the Python version.
    """

    name: str
    node: ast.AST
    local: frozenset[str]
    text: ast.JoinedStr | None


def bound_names(body: Iterable[ast.AST]) -> tuple[set[str], set[str]]:
    """Names that statements bind in their own scope, and those they declare `global` or `nonlocal`."""
    bound: set[str] = set()
    elsewhere: set[str] = set()
    pending = list(body)
    while pending:
        node = pending.pop()
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            bound.add(node.name)
            pending += node.decorator_list
        elif isinstance(node, _COMPREHENSIONS):
            # Only what `:=` binds leaves a comprehension.
            bound.update(part.target.id for part in ast.walk(node) if isinstance(part, ast.NamedExpr))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            elsewhere.update(node.names)
        elif not isinstance(node, ast.Lambda):
            if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
                bound.add(node.id)
            elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
                bound.add(node.name)
            elif isinstance(node, ast.MatchMapping) and node.rest:
                bound.add(node.rest)
            pending += ast.iter_child_nodes(node)
    return bound - elsewhere, elsewhere


def global_occurrences(tree: ast.Module) -> list[Occurrence]:
    """Every place at which a module's source names something global to the module, or built in, in source order."""
    finder = _Finder()
    finder.visit(tree)
    return finder.found


class _Finder(ast.NodeVisitor):
    def __init__(self):
        self.found: list[Occurrence] = []
        self._scopes: list[tuple[str, set[str]]] = []  # ("function" or "class", the names it binds), outermost first
        self._text: ast.JoinedStr | None = None

    def _add(self, name: str, node: ast.AST) -> None:
        local: set[str] = set()
        for depth, (kind, bound) in enumerate(reversed(self._scopes)):
            # The names of a class are seen by its own statements, but not by its methods.
            if kind == "function" or depth == 0:
                if name in bound:
                    return
                local |= bound
        self.found.append(Occurrence(name, node, frozenset(local), self._text))

    def _visit_all(self, nodes: Iterable[ast.AST | None]) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    def _visit_scope(self, kind: str, bound: set[str], nodes: Iterable[ast.AST]) -> None:
        self._scopes.append((kind, bound))
        self._visit_all(nodes)
        self._scopes.pop()

    def visit_Name(self, node: ast.Name) -> None:
        self._add(node.id, node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        outer, self._text = self._text, self._text or node
        self.generic_visit(node)
        self._text = outer

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        body = [node.body] if isinstance(node, ast.Lambda) else node.body
        parameters = [
            *node.args.posonlyargs,
            *node.args.args,
            *node.args.kwonlyargs,
            *filter(None, (node.args.vararg, node.args.kwarg)),
        ]
        if not isinstance(node, ast.Lambda):
            self._visit_all(node.decorator_list)
            self._add(node.name, node)
            self._visit_all([*(parameter.annotation for parameter in parameters), node.returns])
        self._visit_all([*node.args.defaults, *node.args.kw_defaults])
        bound, elsewhere = bound_names(body)
        self._visit_scope("function", (bound | {parameter.arg for parameter in parameters}) - elsewhere, body)

    visit_AsyncFunctionDef = visit_FunctionDef
    visit_Lambda = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_all([*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)])
        self._add(node.name, node)
        self._visit_scope("class", bound_names(node.body)[0], node.body)

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        self.visit(node.generators[0].iter)  # evaluated outside, where it may mean something else by the same name
        bound = bound_names([generator.target for generator in node.generators])[0]
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        for index, generator in enumerate(node.generators):
            parts += [generator.target, *([generator.iter] if index else []), *generator.ifs]
        self._visit_scope("function", bound, parts)

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp
