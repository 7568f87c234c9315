"""The README's lines of Python, run as they are printed, with a small model in the place of the embedded one."""

import re
from pathlib import Path

import pytest

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.mixins import storing
from anomalysd_pipeline.synthetic import normal_images

from .tiny_adaptations import quick_pipeline

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
ELSEWHERE = ("cuda", '"user/', "stable-diffusion")
"""Words of lines that need a GPU, the Hub or gigabytes of weights; those of the Hub are run by test_publishing."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with all pictures and adaptations that the lines name, and the small model."""
    text = "\n".join(BLOCKS)
    names = sorted(set(re.findall(r'"([^"\s]+\.(?:png|jpe?g))"', text)))
    for name, image in zip(names, normal_images("hex_nut", len(names), seed=5, size=64), strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    quick_pipeline().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(storing, "EMBEDDED", str(tmp_path / "base"))
    for name in set(re.findall(r'load_adaptation\("([^"/]+)"\)', text)):
        other = AnomalySDPipeline.from_pretrained()
        other.adapt({name: normal_images("gear", 2, seed=5, size=64)})
        other.save_adaptation(tmp_path / name)
    monkeypatch.setattr("PIL.ImageShow.show", lambda *args, **options: True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_line_of_python_runs_as_printed(place):
    run, names = 0, {}
    for block in BLOCKS:
        if any(word in block for word in ELSEWHERE):
            continue
        exec(compile(block, "README.md", "exec"), names)
        run += block.count("\n")
    assert run >= 8  # of those that anybody can run


def test_lines_that_need_more_are_python_too():
    assert BLOCKS
    for block in BLOCKS:
        compile(block, "README.md", "exec")
