"""Show how far a command has come: a bar in a terminal, elsewhere a line for each stage and one every ten seconds."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

EVERY = 10.0
"""Seconds between lines where there is no terminal."""

BRIEF = 0.3
"""Seconds within which a stage ends without a line."""


class Progress:
    """A stage of a command, shown until the end of a `with` block, also while nothing can be counted.

    Args:
        title: what is done, such as "inspecting".
        total: number of steps; None: unknown, or nothing is counted.
        unit: of a step.
        done: steps done before.
        shown: False for all but the first of several processes.
        leave: whether a terminal keeps the bar at its end.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        unit: str | None = None,
        done: int = 0,
        shown: bool = True,
        leave: bool = True,
    ):
        from tqdm import tqdm  # commands start without it

        self.title, self.total, self.unit, self.n, self.note = title, total, unit, done, ""
        self.external_write_mode = tqdm.external_write_mode
        self._file, self._start = sys.stderr, time.monotonic()
        self._terminal = shown and self._file.isatty()
        # Only the time, where nothing is counted.
        form = {"bar_format": "{desc}[{elapsed}]"} if unit is None else {"unit": unit}
        off = not self._terminal
        self._bar = tqdm(desc=title, total=total, initial=done, disable=off, dynamic_ncols=True, leave=leave, **form)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        if shown:
            self._thread.start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def update(self, steps: int = 1) -> None:
        """Counts further steps."""
        self.n += steps
        self._bar.update(steps)

    def at(self, done: int, total: int) -> None:
        """Sets the count and the number of steps."""
        if total != self.total:
            self.total = self._bar.total = total
        self.update(done - self.n)

    def part(self, expected: int) -> Callable[[int, int], None]:
        """Makes a `callback(done, total)` that counts on from here, in place of the steps expected of a part."""
        before, others = self.n, (self.total or 0) - expected
        return lambda done, total: self.at(before + done, others + total)

    def say(self, title: str | None = None, note: str = "") -> None:
        """Changes the title, and a note behind the count."""
        self.title, self.note = title or self.title, note
        if self._terminal:
            self._bar.set_description_str(f"{self.title}: ", refresh=False)
            self._bar.set_postfix_str(note, refresh=False)

    def close(self) -> None:
        """Ends the stage; does nothing when called again."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._bar.close()

    def _repeat(self) -> None:
        if self._ended.wait(BRIEF):
            return
        while not self._ended.is_set():
            if self._terminal:
                self._bar.refresh()
            else:
                print(f"anomalysd: {self._line()}", file=self._file, flush=True)
            self._ended.wait(1.0 if self._terminal else EVERY)

    def _line(self) -> str:
        seconds = time.monotonic() - self._start
        if self.unit is None:
            return f"{self.title} [{self._bar.format_interval(seconds)}]"
        return self._bar.format_meter(
            self.n, self.total, seconds, ncols=0, prefix=self.title, unit=self.unit, postfix=self.note
        )


class Stages:
    """Counts the steps of a command's stages, one stage after the other, and shows the time before and between them.

    Args:
        title: what is done, such as "learning".
        shown: see `Progress`.
    """

    def __init__(self, title: str, shown: bool = True):
        self.title, self.shown, self._stage = title, shown, None
        self._bar = Progress(title, shown=shown, leave=False)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def step(self, stage: str, step: int, steps: int, note: str = "") -> None:
        """Counts a step, the first of which begins its stage.

        Args:
            stage: its name, such as "denoiser".
            step, steps: its number from 1, and that of the stage's last.
            note: shown behind the count.
        """
        if stage != self._stage:
            self._bar.close()
            self._stage = stage
            self._bar = Progress(f"{self.title}, {stage}", steps, "step", done=step - 1, shown=self.shown)
        self._bar.say(note=note)
        self._bar.update()
        if step == steps:
            self._bar.close()
            self._stage = None
            self._bar = Progress(self.title, shown=self.shown, leave=False)

    def close(self) -> None:
        """Ends the stage; does nothing when called again."""
        self._bar.close()


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Hides the bars that diffusers and transformers draw while they load files; downloads keep theirs."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as of_transformers

    silenced = [own for own in (of_diffusers, of_transformers) if own.is_progress_bar_enabled()]
    downloads = not are_progress_bars_disabled()
    for own in silenced:
        own.disable_progress_bar()
    if downloads:
        enable_progress_bars()  # those of transformers go with the others
    try:
        yield
    finally:
        for own in silenced:
            own.enable_progress_bar()
