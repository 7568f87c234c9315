"""Write the pipeline.py of a published checkpoint, which carries the files of this package."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
from collections.abc import Iterable, Mapping

from .. import __version__
from ..method.prompts import prompts_text
from . import carried
from .model_card import template_text

PACKAGE = __name__.partition(".")[0]
ENTRIES = ("pipeline", "adapters", "prototypes", "scoring")
"""The pipeline, and the old names of components that checkpoints list."""

QUOTES = 3 * "'"
MARGIN = "|"
"""In front of each carried line: diffusers searches the lines of pipeline.py for imports, strings included, and asks
for the files and packages that they name."""

_HEADER = """\
{package} {version} in one file, for diffusers to load where that package is not installed:

    DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)

Where it is installed, `AnomalySDPipeline.from_pretrained(folder)` does the same and runs no code from the folder.

First comes a loader of some {lines} lines. Then come the files of anomalysd-pipeline that the pipeline needs, word for
word, with "|" in front of each line. At the end the pipeline is imported: from the package if it is installed, else
from these files. Written by `{package}.hub.bundle`: change the package rather than this file.
Needs diffusers 0.42 or newer; README.md says what else to install.
License: Apache-2.0.
"""

_FOOTER = """\
provide("{package}", {{path: strip_margin(text) for path, text in _FILES.items()}}, __file__)
AnomalySDPipeline = importlib.import_module("{package}.pipeline").AnomalySDPipeline
"""

_COMPONENT = """\
# The class of this component, from the package if it is installed, else from pipeline.py, which diffusers runs first.

import importlib

{name} = importlib.import_module("{library}").{name}
"""


@functools.cache
def bundle_source() -> str:
    """Writes one file from which `AnomalySDPipeline` can be imported, with this package or without it.

    It carries every module that the pipeline imports, inside functions too: it inspects, adapts and publishes. The
    commands, the app, training from the command line and evaluation are not part of it.

    Returns:
        Python source, the same for the same modules.
    """
    modules = module_sources(PACKAGE, ENTRIES)
    data = {f"{PACKAGE}/prompts.json": prompts_text(), f"{PACKAGE}/hub/template.md": template_text()}
    loader = inspect.getsource(carried)
    loader = "".join(loader.splitlines(keepends=True)[ast.parse(loader).body[0].end_lineno :]).strip()
    header = _HEADER.format(package=PACKAGE, version=__version__, lines=round(loader.count("\n"), -1))
    footer = _FOOTER.format(package=PACKAGE)
    return f'"""{header}"""\n\n{loader}\n\n\n{carry({**modules, **data})}\n\n{footer}'


def component_source(library: str, name: str) -> str | None:
    """Writes the file that diffusers wants a component's folder on the Hub to hold as "<library>.py".

    Args:
        library, name: module and class of the component, as model_index.json lists them.

    Returns:
        Python source; None for a class of another package.
    """
    carried_here = f"{library.replace('.', '/')}.py" in module_sources(PACKAGE, ENTRIES)
    return _COMPONENT.format(library=library, name=name) if carried_here and name.isidentifier() else None


def module_sources(package: str, entries: Iterable[str]) -> dict[str, str]:
    """Collects modules and all that they import from their package, inside functions too.

    Args:
        package: name of a package that can be imported.
        entries: names of its modules, relative to it, to start from.

    Returns:
        Path such as "package/room/module.py" to source, in alphabetical order.

    Raises:
        ModuleNotFoundError: if a module imports another that is not there.
    """
    found: dict[str, str] = {}
    names = [f"{package}.{entry}" for entry in entries]
    seen = set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        source = spec.loader.get_source(name)
        is_package = spec.submodule_search_locations is not None
        found[f"{name.replace('.', '/')}{'/__init__' if is_package else ''}.py"] = source
        names += [name.rpartition(".")[0]] if "." in name else []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                relative = f"{'.' * node.level}{node.module or ''}"
                where = importlib.util.resolve_name(relative, name if is_package else name.rpartition(".")[0])
                # `from . import a` names a module, or an object of the package.
                inner = [f"{where}.{alias.name}" for alias in node.names]
                names += [where, *(module for module in inner if _is_module(where, module))]
    return dict(sorted(found.items()))


def _is_module(package: str, name: str) -> bool:
    spec = importlib.util.find_spec(package)
    is_package = spec is not None and spec.submodule_search_locations is not None
    return is_package and importlib.util.find_spec(name) is not None


def carry(files: Mapping[str, str]) -> str:
    """Writes files as a dictionary of raw strings, a margin in front of each line.

    Raises:
        ValueError: for a text that holds three single quotes in a row.
    """
    lines = ["_FILES = {"]
    for path, text in files.items():
        if QUOTES in text:
            raise ValueError(f"`files` must not hold {QUOTES}, which ends a raw string, but '{path}' does.")
        lines += [f'    "{path}": r{QUOTES}', *(f"{MARGIN}{line}" for line in text.split("\n")), f"{QUOTES},"]
    return "\n".join([*lines, "}"])
