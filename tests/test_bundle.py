"""Joining modules into one file: names, imports and what is left out, on small packages and on our own."""

import ast
import importlib
import sys
import types

import pytest

from anomalysd_pipeline.hub.bundle import bundle_source, component_sources


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`package({"pipeline": source, ...})` writes a package and returns its folder; its name cannot be imported."""

    def write(modules: dict[str, str]):
        folder = tmp_path / "smallpack"
        for name, source in {"__init__": "", **modules}.items():
            path = folder / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return folder

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "smallpack"]:
        del sys.modules[name]


def run(source: str) -> types.ModuleType:
    """The bundle as a module, as diffusers would load it."""
    module = types.ModuleType("bundled_for_test")
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, "bundle.py", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module


class TestOneFile:
    def test_modules_follow_those_they_need(self, package):
        folder = package(
            {
                "pipeline": "from .middle import double\n\n\ndef answer():\n    return double() + 1\n",
                "middle": "from .low import BASE\n\nDOUBLE = 2 * BASE\n\n\ndef double():\n    return DOUBLE\n",
                "low": "BASE = 20\n",
                "unused": "raise RuntimeError\n",
            }
        )
        source = bundle_source(folder)
        assert run(source).answer() == 41
        assert "RuntimeError" not in source

    def test_comments_and_docstrings_stay(self, package):
        folder = package(
            {
                "pipeline": '"""What it is."""\n\n# why\nVALUE = 1  # because\n\n\n'
                'def f():\n    """Says."""\n    # here\n'
            }
        )
        source = bundle_source(folder)
        for kept in ("# What it is.", "# why\n", "VALUE = 1  # because", '"""Says."""', "    # here"):
            assert kept in source

    def test_same_source_every_time(self, package):
        folder = package(
            {"pipeline": "import os, re, ast\nfrom sys import path, argv\n\nX = (os, re, ast, path, argv)\n"}
        )
        assert bundle_source(folder) == bundle_source(folder)

    def test_subpackages_and_what_they_pass_on(self, package):
        folder = package(
            {
                "pipeline": "from .inner import shown as seen\n\n\ndef answer():\n    return seen()\n",
                "inner/__init__": "from .deep import shown\n\n__all__ = ['shown']\n",
                "inner/deep": "from ..low import BASE\n\n\ndef shown():\n    return BASE\n",
                "low": "BASE = 5\n",
            }
        )
        assert run(bundle_source(folder)).answer() == 5

    def test_of_the_package_itself_only_what_is_imported(self, package):
        folder = package(
            {
                "__init__": "from pathlib import Path\nimport re\n\nHERE = Path('a')\nNAME = str(HERE)\n"
                "OTHER = re\n\n\ndef __getattr__(name):\n    from . import pipeline\n\n    return pipeline\n",
                "pipeline": "from . import NAME\n\n\ndef answer():\n    return NAME\n",
            }
        )
        source = bundle_source(folder)
        assert run(source).answer() == "a"
        assert "__getattr__" not in source and "OTHER" not in source and "import re" not in source

    def test_no_relative_import_is_left(self):
        source = bundle_source()
        for node in ast.walk(ast.parse(source)):
            assert not (isinstance(node, ast.ImportFrom) and node.level)
        # diffusers searches the text, docstrings too, for what it takes to be imports of files beside it.
        assert "\nfrom ." not in source and " from ." not in source

    def test_our_own_bundle_needs_nothing_of_the_package(self):
        names = {
            (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
            for node in ast.walk(ast.parse(bundle_source()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert "anomalysd_pipeline" not in names
        assert {"torch", "diffusers"} <= names
        header = ast.get_docstring(ast.parse(bundle_source()))
        assert "License: Apache-2.0" in header and "anomalysd-pipeline" in header


class TestNames:
    def test_clashing_names_are_told_apart(self, package):
        folder = package(
            {
                "pipeline": "from .a import first\n\n_part = 'pipeline'\n\n\n"
                "def answer():\n    return first(), _part\n",
                "a": "from .b import second\n\n_part = 'a'\n\n\ndef first():\n    return [_part, *second()]\n",
                "b": "_part = 'b'\n\n\ndef second():\n    global _part\n    _part += '!'\n    return [_part]\n",
            }
        )
        assert run(bundle_source(folder)).answer() == (["a", "b!"], "pipeline")

    def test_locals_parameters_attributes_and_keywords_keep_theirs(self, package):
        body = (
            "from .other import size as other_size\n\n\n"
            "def size(x):\n    return 10 * x\n\n\n"
            "class Box:\n    size: int = 3\n\n    def grow(self, size):\n        return self.size + size\n\n"
            "    def globally(self):\n        return size(self.size)\n\n\n"
            "def answer():\n    def local():\n        size = 7\n        return size\n\n"
            "    return [Box().grow(size=4), Box().globally(), local(), [size for size in (1,)], other_size(2),"
            " (lambda size: size)(5)]\n"
        )
        folder = package(
            {
                "pipeline": "from .used import answer\n\nsize = None\n",
                "used": body,
                "other": "def size(x):\n    return 100 * x\n",
            }
        )
        assert run(bundle_source(folder)).answer() == [7, 30, 7, [1], 200, 5]

    def test_inside_f_strings(self, package):
        folder = package(
            {
                "pipeline": "from .a import text\n\nname = 'p'\n\n\ndef answer():\n    return text()\n",
                "a": "name = 'a'\n\n\ndef text():\n    return f'<{name!r:>5}>' f'{name}'\n",
            }
        )
        assert run(bundle_source(folder)).answer() == "<  'a'>a"

    def test_imports_of_one_name_from_two_places(self, package):
        folder = package(
            {
                "pipeline": "from json import dumps as write\nfrom .a import other\n\n\n"
                "def answer():\n    return write([1]), other()\n",
                "a": "from pprint import pformat as write\n\n\ndef other():\n    return write({1})\n",
            }
        )
        assert run(bundle_source(folder)).answer() == ("[1]", "{1}")

    def test_a_name_of_ours_does_not_shadow_a_builtin_elsewhere(self, package):
        folder = package(
            {
                "pipeline": "from .a import filter as keep\n\n\n"
                "def answer():\n    return keep(), list(filter(None, [0, 1]))\n",
                "a": "def filter():\n    return 'ours'\n",
            }
        )
        assert run(bundle_source(folder)).answer() == ("ours", [1])

    def test_an_alias_does_not_end_up_as_a_local(self, package):
        folder = package(
            {
                "pipeline": "from .a import scale as factor\n\n\ndef answer(scale=2):\n    return scale * factor()\n",
                "a": "def scale():\n    return 21\n",
            }
        )
        assert run(bundle_source(folder)).answer() == 42


class TestLazyImports:
    def test_come_from_the_package(self, package):
        folder = package(
            {
                "pipeline": "def answer():\n    from .extra import VALUE as value\n\n    return value\n",
                "extra": "VALUE = 3\n",
            }
        )
        module = run(bundle_source(folder))
        with pytest.raises(ImportError, match="install the package"):
            module.answer()
        sys.path.insert(0, str(folder.parent))
        importlib.invalidate_caches()
        try:
            assert module.answer() == 3
        finally:
            sys.path.remove(str(folder.parent))

    def test_come_from_the_file_where_it_holds_them(self, package):
        folder = package(
            {
                "pipeline": "from .extra import VALUE\n\n\ndef answer():\n    from .extra import VALUE, _hidden\n\n"
                "    return VALUE + _hidden()\n",
                "extra": "VALUE = 3\n\n\ndef _hidden():\n    return 4\n",
            }
        )
        assert run(bundle_source(folder)).answer() == 7

    def test_those_for_type_checkers_are_left_out(self, package):
        folder = package(
            {
                "pipeline": "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n\n"
                "from .low import f\n\nif TYPE_CHECKING:\n    from .absent import Thing\n\n\n"
                "class Pipe:\n    def answer(self) -> Thing:\n        return f(self)\n",
                "low": "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n\n"
                "if TYPE_CHECKING:\n    from .pipeline import Pipe\n\n\ndef f(pipe: Pipe):\n    return 1\n",
            }
        )
        module = run(bundle_source(folder))
        assert module.Pipe().answer() == 1
        assert module.f.__annotations__ == {"pipe": "Pipe"}


class TestComponents:
    MODULES = {
        "pipeline": "from .parts import Part\n\n\ndef make():\n    return Part()\n",
        "parts": "class ModelMixin:\n    pass\n\n\nclass Part(ModelMixin):\n    pass\n",
    }

    def test_the_file_stands_for_a_missing_module(self, package):
        folder = package(self.MODULES)
        module = run(bundle_source(folder))
        assert sys.modules["smallpack.parts"] is module
        assert module.Part.__module__ == "smallpack.parts"
        newer = run(bundle_source(folder))
        assert sys.modules["smallpack.parts"] is newer

    def test_an_installed_module_comes_first(self, package, monkeypatch):
        folder = package(self.MODULES)
        monkeypatch.syspath_prepend(folder.parent)
        module = run(bundle_source(folder))
        assert type(module.make()) is sys.modules["smallpack.parts"].Part
        assert sys.modules["smallpack.parts"] is not module

    def test_a_component_file_takes_its_class_from_the_bundle(self, package):
        folder = package(self.MODULES)
        module = run(bundle_source(folder))
        (source,) = component_sources(folder).values()
        assert run(source).Part is module.Part


class TestRefusals:
    @pytest.mark.parametrize(
        ("modules", "words"),
        [
            ({"pipeline": "from .a import x\n", "a": "from .pipeline import y\nx = 1\n"}, "import each other"),
            ({"pipeline": "from .a import *\n", "a": "x = 1\n"}, "no single object"),
            ({"pipeline": "from . import a\n", "a": "x = 1\n"}, "no single object"),
            ({"pipeline": "try:\n    from .a import x\nexcept ImportError:\n    x = 2\n", "a": "x = 1\n"}, "block"),
            ({"pipeline": "from .a import x\n\n\ndef f():\n    return x\n", "a": "y = 1\n"}, "where there is none"),
        ],
    )
    def test_what_cannot_be_joined(self, package, modules, words):
        with pytest.raises(ValueError, match=words):
            bundle_source(package(modules))
