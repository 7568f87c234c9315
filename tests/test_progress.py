"""Progress of a command, with a terminal and without one."""

import io
import sys
import time

import pytest
from diffusers.utils import logging as of_diffusers
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as of_transformers

from anomalysd_pipeline.common import progress
from anomalysd_pipeline.common.progress import Progress, Stages, quiet_loading


@pytest.fixture
def lines(monkeypatch, capsys):
    """The lines so far on the stream of errors, which is no terminal, where one comes ten times a second."""
    monkeypatch.setattr(progress, "EVERY", 0.1)
    texts = []

    def read():
        texts.append(capsys.readouterr().err)
        return "".join(texts).splitlines()

    return read


def wait(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_lines_come_at_once_and_while_nothing_is_done(lines):
    with Progress("learning ring", 4, "picture") as bar:
        wait(lines)
        assert lines()[0].startswith("anomalysd: learning ring:   0% 0/4 [00:00<")
        bar.at(3, 6)
        bar.say(note="loss 0.5")
        wait(lambda: any("3/6 [" in line and "loss 0.5" in line for line in lines()))
        bar.update()
        wait(lambda: any("4/6 [" in line for line in lines()))
    count = len(lines())
    time.sleep(0.3)
    assert len(lines()) == count
    bar.close()


def test_what_is_not_counted_shows_the_time(lines):
    with Progress("loading the model"):
        wait(lines)
    assert lines()[0] == "anomalysd: loading the model [00:00]"


def test_other_processes_say_nothing(lines):
    with Progress("inspecting", 3, "picture", shown=False) as bar:
        bar.update()
        time.sleep(0.3)
    assert bar.n == 1 and not lines()


def test_a_terminal_shows_a_bar_of_its_own(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("inspecting", 2, "picture") as bar:
        bar.update(2)
    shown = sys.stderr.getvalue()
    assert "anomalysd" not in shown and "0/2" in shown and "2/2" in shown


def test_loading_bars_are_hidden_and_come_back():
    both = (of_diffusers, of_transformers)
    before = [own.is_progress_bar_enabled() for own in both]
    for own in both:
        own.enable_progress_bar()
    with quiet_loading():
        assert not any(own.is_progress_bar_enabled() for own in both)
        assert not are_progress_bars_disabled()
    assert all(own.is_progress_bar_enabled() for own in both)
    for own, was in zip(both, before, strict=True):
        if not was:
            own.disable_progress_bar()


def test_stages_are_counted_and_the_time_between_them_shown(lines, monkeypatch):
    monkeypatch.setattr(progress, "BRIEF", 0)
    with Stages("learning") as bar:
        wait(lambda: "anomalysd: learning [00:00]" in lines())
        for step in (3, 4):  # of a resumed run
            bar.step("denoiser", step, 4, "loss 0.5")
            wait(
                lambda step=step: (
                    step == 4 or any("denoiser:  75% 3/4" in line and "loss 0.5" in line for line in lines())
                )
            )
        before = len(lines())
        wait(lambda: "anomalysd: learning [00:00]" in lines()[before:])
        bar.step("decoder", 1, 2)
        wait(lambda: any("anomalysd: learning, decoder:  50% 1/2" in line for line in lines()[before:]))


def test_parts_count_on_and_correct_what_was_expected(lines):
    with Progress("calibrating", 3, "picture") as bar:
        first = bar.part(1)
        first(1, 4)
        assert (bar.n, bar.total) == (1, 6)
        first(4, 4)
        second = bar.part(2)
        second(2, 2)
        assert (bar.n, bar.total) == (6, 6)
