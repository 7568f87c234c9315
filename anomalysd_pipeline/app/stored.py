"""The ready examples as the page shows them, drawn once for all visitors."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from ..app import views
from .desk import Desk
from .figures import compared, masks
from .gallery import Example, load_examples
from .heat import HeatView

NOTE = "A stored result, made after four pictures of good ones."


@dataclass(frozen=True)
class Drawn:
    """Holds what the page shows of an example: two texts of HTML, its heatmap, and addresses of pictures."""

    verdict: str
    gauge: str
    view: HeatView
    compare: tuple[str, str]
    masks: list[tuple[str, str]]


class StoredExamples:
    """Reads the examples, and draws each when it is first asked for.

    Args:
        desk: publishes the pictures.
        keeper: a component of the page, in whose name they are kept.

    Raises:
        ValueError: there are none in this installation.
    """

    def __init__(self, desk: Desk, keeper: gr.components.Component):
        self.examples: list[Example] = load_examples()
        self._desk, self._keeper = desk, keeper
        self.drawn = functools.cache(self._draw)

    def path(self, number: int) -> str:
        """Returns the path of an example's picture, as the page's image has it."""
        return save_file_to_cache(self.examples[number].path, cache_dir=self._keeper.GRADIO_CACHE)

    def _draw(self, number: int) -> Drawn:
        example = self.examples[number]
        with tempfile.TemporaryDirectory() as folder:
            pair = tuple(map(self._published, compared(example, Path(folder))))
            shown = masks(example.image, (), example.prototype_mask, example.predicted, Path(folder))
            shown = [(self._published(path), title) for path, title in shown]
        return Drawn(
            views.verdict(example.sentence, example.is_defective, example.title),
            views.gauge(example.score, example.threshold),
            HeatView(example.image, example.anomaly_map),
            pair,
            shown,
        )

    def _published(self, path: str) -> str:
        """Keeps a picture for everybody, for as long as the app runs; returns its path."""
        kept = save_file_to_cache(path, cache_dir=self._keeper.GRADIO_CACHE)
        self._keeper.keep_in_cache.add(kept)
        self._desk.handouts.publish([kept])
        return kept
