"""Import a package from texts, where it is not installed.

The text of this module is part of every published pipeline.py: it needs the standard library alone.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import warnings
from collections.abc import Mapping


class CarriedPackage(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """Finds and loads the modules of a package whose files are texts in memory.

    Args:
        files: path such as "package/room/module.py" to text, data files included.
        origin: file that carries them. Modules get paths below it, for tracebacks: "<origin>/package/room/module.py".
    """

    def __init__(self, files: Mapping[str, str], origin: str):
        self.files, self.origin = files, origin

    def find_spec(self, name, path=None, target=None):
        if self._path(name) is None:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=self.is_package(name))

    def is_package(self, name) -> bool:
        return self._path(name).endswith("/__init__.py")

    def get_filename(self, name) -> str:
        return os.path.join(self.origin, *self._path(name).split("/"))

    def get_source(self, name) -> str:
        return self.files[self._path(name)]

    def get_data(self, path) -> bytes:
        """Gives the content of a file by its path below `origin`, as `pkgutil.get_data` wants it."""
        key = os.path.relpath(path, self.origin).replace(os.sep, "/")
        if key not in self.files:
            raise FileNotFoundError(f"{self.origin} carries no file {key}.")
        return self.files[key].encode()

    def _path(self, name: str) -> str | None:
        base = name.replace(".", "/")
        return next((path for path in (f"{base}/__init__.py", f"{base}.py") if path in self.files), None)


def strip_margin(text: str) -> str:
    """Undoes `bundle.carry`: drops the empty first and last line and the margin of all others."""
    return "\n".join(line[1:] for line in text.split("\n")[1:-1])


def provide(package: str, files: Mapping[str, str], origin: str) -> None:
    """Makes `import package` work from `files`, unless it is installed or another file has provided it.

    A process holds one package of a name. Where it was provided with other texts before, those stay, with a warning.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:  # without an origin it is just a folder of that name
        sys.modules.pop(package, None)
        sys.meta_path.insert(0, CarriedPackage(files, origin))
    elif getattr(spec.loader, "files", files) != files:
        warnings.warn(
            f"{origin} carries another version of {package} than the one loaded from {spec.origin}, which stays in "
            "use; load each in a process of its own to get the scores it was published with.",
            stacklevel=2,
        )
