"""The modules that `bundle` joins: what each one imports, what its names stand for, and what they are called in one
file."""

from __future__ import annotations

import ast
import builtins
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .bundle_scopes import Occurrence, bound_names, global_occurrences

COMPONENT_BASES = {"ModelMixin", "SchedulerMixin"}
"""A class with one of these bases is a component, which model_index.json lists under its module."""

ADDED_NAMES = ("_COMPONENTS", "_class", "_classes", "_from_package", "_module", "_name")
"""Names that `bundle` itself uses in the file."""


class Entity(NamedTuple):
    """What a global name stands for.

    kind: "def" in our module `where`, "import" of `where` (its `attribute`, or the whole module), "builtin", or
        "unknown": a name that stands in annotations alone.
    name: what it is called there.
    """

    kind: str
    where: str
    name: str
    attribute: str | None = None


ADDED_IMPORTS = (Entity("import", "importlib", "importlib"), Entity("import", "sys", "sys"))


@dataclass
class Module:
    """A module of the package.

    name: within the package, "" for the package's own `__init__`.
    own, typed: imported name to (module of ours, name there); `typed` where it is imported for type checkers alone.
    external: imported name to what it stands for.
    dotted: what plain imports name in full.
    removed: statements that are not part of the bundle.
    defined: names that what is left binds.
    occurrences: where what is left uses global names.
    """

    name: str
    path: Path
    source: bytes
    tree: ast.Module
    comment: str = ""
    own: dict[str, tuple[str, str]] = field(default_factory=dict)
    typed: dict[str, tuple[str, str]] = field(default_factory=dict)
    external: dict[str, Entity] = field(default_factory=dict)
    dotted: set[str] = field(default_factory=set)
    removed: list[ast.stmt] = field(default_factory=list)
    defined: set[str] = field(default_factory=set)
    occurrences: list[Occurrence] = field(default_factory=list)

    @property
    def kept(self) -> list[ast.stmt]:
        """The statements that are part of the bundle."""
        return [statement for statement in self.tree.body if statement not in self.removed]

    def refuse(self, reason: str) -> ValueError:
        """The error for what cannot be joined."""
        return ValueError(f"`entry` reaches {self.path.name}, which {reason}; write it another way to bundle it.")


class ModuleGraph:
    """A module and all that it imports from its package at the top of modules.

    Args:
        package: the package's folder.
        entry: the module to start from.

    Attributes:
        modules: by name, each after those it needs.
        names: every entity's name in one file; see `entity`.

    Raises:
        ValueError: if modules import each other in a circle, or in a way that cannot be joined.
    """

    def __init__(self, package: Path, entry: str):
        self.package = package
        self.modules: dict[str, Module] = {}
        self._read(entry, [])
        self._shake()
        for module in self.modules.values():
            module.defined = bound_names(module.kept)[0]
            module.occurrences = global_occurrences(ast.Module(module.kept, []))
        self.names = self._name()

    def path(self, name: str) -> Path | None:
        """The file of a module of the package; None if there is none of that name."""
        base = self.package.joinpath(*name.split(".")) if name else self.package
        candidates = [base / "__init__.py"] if not name else [base.with_suffix(".py"), base / "__init__.py"]
        return next((path for path in candidates if path.is_file()), None)

    def absolute(self, name: str, statement: ast.ImportFrom) -> str:
        """The module that a relative import in module `name` reads from."""
        parts = name.split(".") if name else []
        is_folder = self.path(name).name == "__init__.py"
        parts = parts[: len(parts) - statement.level + is_folder]
        return ".".join([*parts, *filter(None, [statement.module])])

    def entity(self, module: Module, name: str) -> Entity:
        """What a name that is global to a module stands for, followed through the imports of our own modules."""
        if name in module.own:
            where, original = module.own[name]
            entity = self.entity(self.modules[where], original)
            if entity.kind not in ("def", "import"):
                raise module.refuse(f"imports {original!r} from '{where}', where there is none")
            return entity
        if name in module.external:
            return module.external[name]
        if name in module.defined:
            return Entity("def", module.name, name)
        where, original = module.typed.get(name, ("", ""))
        if original and where in self.modules:
            return self.entity(self.modules[where], original)
        return Entity("builtin" if hasattr(builtins, name) else "unknown", "", name)

    def components(self) -> dict[str, list[str]]:
        """Module, with the package's name, to the components that it defines."""
        found: dict[str, list[str]] = {}
        for module in self.modules.values():
            for statement in module.kept:
                if COMPONENT_BASES & {ast.unparse(base) for base in getattr(statement, "bases", ())}:
                    found.setdefault(f"{self.package.name}.{module.name}", []).append(statement.name)
        return dict(sorted(found.items()))

    # Reading

    def _read(self, name: str, importing: list[str]) -> None:
        if name in importing:
            raise ValueError(f"`entry` reaches modules that import each other: {' -> '.join([*importing, name])}.")
        if name in self.modules:
            return
        path = self.path(name)
        source = path.read_bytes()
        module = Module(name, path, source, ast.parse(source))
        module.comment = ast.get_docstring(module.tree) or ""
        for index, statement in enumerate(module.tree.body):
            dropped = index == 0 and bool(module.comment)
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                self._read_import(module, statement)
                dropped = True
            elif isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
                for inner in filter(lambda node: isinstance(node, ast.ImportFrom) and node.level, statement.body):
                    where = self.absolute(name, inner)
                    module.typed |= {alias.asname or alias.name: (where, alias.name) for alias in inner.names}
                dropped = True
            elif isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
                dropped = True
            elif not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                for inner in ast.walk(statement):
                    if isinstance(inner, ast.ImportFrom) and inner.level:
                        raise module.refuse(f"has `{ast.unparse(inner)}` inside a block")
            if dropped:
                module.removed.append(statement)
        for other, _ in module.own.values():
            self._read(other, [*importing, name])
        self.modules[name] = module

    def _read_import(self, module: Module, statement: ast.Import | ast.ImportFrom) -> None:
        for alias in statement.names:
            bound = alias.asname or alias.name.split(".")[0]
            if isinstance(statement, ast.Import):
                module.external[bound] = Entity("import", alias.name if alias.asname else bound, bound)
                if not alias.asname:
                    module.dotted.add(alias.name)
            elif statement.level:
                where = self.absolute(module.name, statement)
                if alias.name == "*" or self.path(f"{where}.{alias.name}".lstrip(".")):
                    raise module.refuse(f"has `{ast.unparse(statement)}`, which names no single object")
                module.own[bound] = (where, alias.name)
            elif statement.module != "__future__" and alias.name != "TYPE_CHECKING":
                module.external[bound] = Entity("import", statement.module, bound, alias.name)

    def _shake(self) -> None:
        """Keeps of the package's own `__init__` only what others import from it: the rest is for its users."""
        root = self.modules.get("")
        if root is None:
            return
        needed = {name for module in self.modules.values() for where, name in module.own.values() if where == ""}
        kept: list[ast.stmt] = []
        while more := [s for s in root.kept if s not in kept and bound_names([s])[0] & needed]:
            kept += more
            needed |= {node.id for statement in more for node in ast.walk(statement) if isinstance(node, ast.Name)}
        root.removed += [statement for statement in root.kept if statement not in kept]
        root.external = {name: entity for name, entity in root.external.items() if name in needed}

    # Naming

    def _name(self) -> dict[Entity, str]:
        """Every entity keeps its own name, but for those that share one with another."""
        order = list(self.modules)
        used = dict.fromkeys(ADDED_IMPORTS)
        hidden = set()
        identifiers = set(dir(builtins))
        for module in self.modules.values():
            used.update(dict.fromkeys(module.external.values()))
            for occurrence in module.occurrences:
                entity = self.entity(module, occurrence.name)
                used[entity] = None
                # Imported under another name, and used where its own name means something local.
                if entity.name != occurrence.name and entity.name in occurrence.local:
                    hidden.add(entity)
            for node in ast.walk(module.tree):
                identifiers |= {getattr(node, part, None) for part in ("id", "arg", "name")}

        def rank(entity: Entity) -> tuple:
            kind = ("unknown", "builtin", "import", "def").index(entity.kind)
            # The later a module, the more people know its names.
            place = -order.index(entity.where) if entity.kind == "def" else entity not in ADDED_IMPORTS
            return kind, place, entity[1:3]

        names: dict[Entity, str] = {}
        taken = set(ADDED_NAMES)
        for entity in sorted(used, key=rank):
            name = entity.name
            if entity.kind in ("import", "def") and (name in taken or entity in hidden):
                prefix = re.sub(r"\W", "_", entity.where)
                name = f"_{prefix}_{(entity.attribute or name if entity.kind == 'import' else name).lstrip('_')}"
                while name in taken or name in identifiers:
                    name += "_"
            names[entity] = name
            if entity.kind != "unknown":
                taken.add(name)
        return names
