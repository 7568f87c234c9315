"""Modules carried in one file: which they are, how they are written, and how they are imported, on small packages and
on our own."""

import importlib
import inspect
import linecache
import pkgutil
import sys
import traceback
import types
import warnings

import pytest
from diffusers.utils.dynamic_modules_utils import check_imports, get_relative_imports

from anomalysd_pipeline.hub.bundle import bundle_source, carry, component_source, module_sources
from anomalysd_pipeline.hub.carried import provide, strip_margin

PARTS = {
    "__init__": "def __getattr__(name):\n    if name != 'answer':\n        raise AttributeError(name)\n"
    "    from . import pipeline\n\n    return pipeline.answer\n",
    "pipeline": "from typing import TYPE_CHECKING\n\nfrom .room.middle import double\n\nif TYPE_CHECKING:\n"
    "    from .typed import Thing\n\n\ndef answer() -> 'Thing':\n    from .lazy import ONE\n\n"
    "    return double() + ONE\n",
    "room/__init__": '"""A room."""\n',
    "room/middle": "from .. import low\nfrom . import deep\n\n\ndef double():\n    return 2 * low.BASE * deep.ONCE\n",
    "room/deep": "ONCE = 1\n",
    "low": "BASE = 20\n",
    "lazy": "import json\n\nONE = json.loads('1')\n",
    "typed": "class Thing:\n    pass\n",
    "unused": "raise RuntimeError\n",
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """`small(parts)` makes a package `smallpack` that can be imported until `small.uninstall()`; all is undone."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "smallpack"]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def write(parts):
        for name, source in parts.items():
            path = tmp_path / "installed" / "smallpack" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        sys.path.insert(0, str(tmp_path / "installed"))
        forget()

    def uninstall():
        sys.path.remove(str(tmp_path / "installed"))
        forget()

    write.uninstall, write.forget = uninstall, forget
    yield write
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path / "installed")]
    forget()


@pytest.fixture
def sources(small):
    """The files of `smallpack`, which is not installed any more."""
    small(PARTS)
    found = module_sources("smallpack", ["pipeline"])
    small.uninstall()
    return found


class TestModules:
    def test_what_the_pipeline_imports_anywhere(self, sources):
        assert list(sources) == sorted(f"smallpack/{name}.py" for name in PARTS if name != "unused")
        assert sources["smallpack/room/middle.py"] == PARTS["room/middle"]

    def test_the_same_from_a_package_that_is_carried_itself(self, sources):
        provide("smallpack", sources, "carrying.py")
        assert module_sources("smallpack", ["pipeline"]) == sources

    def test_a_module_that_is_missing(self, small):
        small({"__init__": "", "pipeline": "from .absent import Thing\n"})
        with pytest.raises(ModuleNotFoundError, match=r"smallpack\.absent"):
            module_sources("smallpack", ["pipeline"])


class TestText:
    TEXTS = {
        "quotes": 'a = """b"""\n\nc = ""\n',
        "backslashes": "a = '\\\\n' \\\n    '\\\\'\n\\",
        "no end of line": "a = 1",
        "empty": "",
        "braces": "a = f'{b}' {{ }}\n",
        "other alphabets and breaks": "# λ 漢字 \x0c \x85 \u2028 |\n\n|\n",
    }

    def test_comes_back_as_it_was(self):
        namespace = {}
        exec(carry(self.TEXTS), namespace)
        assert {path: strip_margin(text) for path, text in namespace["_FILES"].items()} == self.TEXTS

    def test_that_would_end_its_string_is_refused(self):
        with pytest.raises(ValueError, match="'a.py'"):
            carry({"a.py": "b = '''c'''\n"})

    def test_is_read_by_nobody_as_imports_of_pipeline_py(self, tmp_path, capfd):
        path = tmp_path / "pipeline.py"
        path.write_text(bundle_source(), encoding="utf-8")
        assert get_relative_imports(path) == []
        check_imports(path)
        assert "might require" not in capfd.readouterr().err

    def test_same_every_time(self):
        assert bundle_source.__wrapped__() == bundle_source()


class TestProvided:
    def test_modules_import_each_other(self, sources):
        provide("smallpack", sources, "carrying.py")
        module = importlib.import_module("smallpack.pipeline")
        assert module.answer() == 41
        assert importlib.import_module("smallpack").answer is module.answer
        assert module.__spec__.parent == "smallpack" and sys.modules["smallpack.room"].__path__
        with pytest.raises(ModuleNotFoundError, match=r"smallpack\.unused"):
            importlib.import_module("smallpack.unused")

    def test_source_is_shown_by_tracebacks_and_inspect(self, sources):
        provide("smallpack", {**sources, "smallpack/low.py": "BASE = 'a'\n"}, "carrying.py")
        module = importlib.import_module("smallpack.pipeline")
        assert "return double() + ONE" in inspect.getsource(module.answer)
        linecache.clearcache()
        with pytest.raises(TypeError) as caught:
            module.answer()
        shown = "".join(traceback.format_exception(caught.value))
        assert "carrying.py/smallpack/pipeline.py" in shown and "return double() + ONE" in shown

    def test_data_beside_modules(self, sources):
        provide("smallpack", {**sources, "smallpack/room/table.csv": "λ\n"}, "carrying.py")
        assert pkgutil.get_data("smallpack.room", "table.csv") == "λ\n".encode()
        with pytest.raises(FileNotFoundError, match="smallpack/none"):
            pkgutil.get_data("smallpack", "none")

    def test_an_installed_package_comes_first(self, small):
        small(PARTS)
        sources = module_sources("smallpack", ["pipeline"])
        small.forget()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            provide("smallpack", {**sources, "smallpack/low.py": "BASE = 0\n"}, "carrying.py")
        assert importlib.import_module("smallpack.pipeline").answer() == 41

    def test_a_folder_of_that_name_is_no_package(self, sources, tmp_path, monkeypatch):
        (tmp_path / "here" / "smallpack").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path / "here")
        assert importlib.import_module("smallpack").__file__ is None
        provide("smallpack", sources, "carrying.py")
        assert importlib.import_module("smallpack.pipeline").answer() == 41

    def test_the_first_version_stays_and_a_second_is_told(self, sources):
        second = {**sources, "smallpack/low.py": "BASE = 0\n"}
        provide("smallpack", sources, "first.py")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            provide("smallpack", dict(sources), "same.py")
        with pytest.warns(UserWarning, match=r"second\.py carries another version of smallpack .* first\.py"):
            provide("smallpack", second, "second.py")
        assert importlib.import_module("smallpack.pipeline").answer() == 41


class TestOurs:
    def test_a_pipeline_needs_no_commands_and_no_app(self):
        paths = set(module_sources("anomalysd_pipeline", ["pipeline"]))
        assert {f"anomalysd_pipeline/{name}.py" for name in ("__init__", "pipeline", "models/bank")} <= paths
        rooms = {path.split("/")[1].removesuffix(".py") for path in paths}
        assert not rooms & {"app", "cli", "detect", "evaluate", "evaluation", "inspection", "train", "training"}

    def test_the_installed_package_is_used_where_it_is(self):
        module = types.ModuleType("bundled_for_test")
        module.__file__ = "pipeline.py"
        exec(compile(bundle_source(), "pipeline.py", "exec"), module.__dict__)
        assert module.AnomalySDPipeline is importlib.import_module("anomalysd_pipeline.pipeline").AnomalySDPipeline
        assert "License: Apache-2.0" in module.__doc__ and "anomalysd-pipeline" in module.__doc__

    @pytest.mark.parametrize(
        ("library", "name"), [("models.bank", "PrototypeBank"), ("scoring", "PerceptualDistance")]
    )
    def test_a_component_file_has_its_class(self, library, name):
        namespace = {}
        exec(component_source(f"anomalysd_pipeline.{library}", name), namespace)
        module = importlib.import_module(f"anomalysd_pipeline.{library}")
        assert namespace[name] is getattr(module, name)

    @pytest.mark.parametrize(
        ("library", "name"),
        [
            ("diffusers", "AutoencoderKL"),
            ("None", "None"),
            ("anomalysd_pipeline.app.page", "Page"),
            ('anomalysd_pipeline"); print("', "X"),
            ("anomalysd_pipeline.models.bank", "X\nprint()"),
        ],
    )
    def test_no_component_file_for_anything_else(self, library, name):
        assert component_source(library, name) is None
