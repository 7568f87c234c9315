"""SECURITY.md names, for each promise, tests that are there."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "SECURITY.md").read_text(encoding="utf-8")
NAME = re.compile(r"`(?:tests/)?(test_\w+\.py)?(?:::)?(Test\w+)?`")


def test_every_promise_names_tests_that_exist():
    table = [line for line in TEXT.splitlines() if line.startswith("| ") and "shown by" not in line]
    loading = TEXT.partition("## Loading")[2].partition("## The app")[0].split("\n- ")[1:]
    promises = [line.rpartition(" | ")[2] for line in table] + loading
    assert len(table) > 15 and len(loading) > 1
    for promise in promises:
        named = [found for found in NAME.findall(promise) if any(found)]
        assert named, promise
        for file, kind in named:
            source = (TESTS / (file or "test_app_hostile.py")).read_text(encoding="utf-8")
            assert f"class {kind}" in source if kind else "def test_" in source, (file, kind)
