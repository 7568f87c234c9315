"""Small pictures of what a visitor has uploaded, so that a wrong file is seen before it is taught or inspected."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import gradio as gr

from ..app import views
from .desk import Desk, visitor_of
from .uploads import Upload, common_depth, expand, read_picture

MOST = 24
SIDE = 96


def strip(uploads: list[Upload]) -> str:
    """Draws the first pictures of some uploads; one that cannot be read is marked, with its fault as a hint."""
    shown = []
    for upload in uploads[:MOST]:
        try:
            shown.append((upload.shown_name, views.shrunk(upload.load(), SIDE), ""))
        except ValueError as error:
            shown.append((upload.shown_name, None, str(error)))
    return views.thumbnails(shown, len(uploads) - len(shown))


def under(desk: Desk, files: gr.File, argument: str, list_uploads: Callable) -> gr.HTML:
    """Adds the small pictures under a list of files.

    Args:
        desk: tells whose uploads they are.
        files: the list.
        argument: its name in errors.
        list_uploads: makes uploads of the paths and names of files; see `pictures_of` and `pictures_in`.
    """
    place = gr.HTML("", elem_classes="thumbnail-place", elem_id=f"{files.elem_id}-thumbnails")

    def look(given, request: gr.Request):
        try:
            named = desk.uploads_of(visitor_of(request), given, argument)
            return strip(list_uploads(named, desk.limits))
        except ValueError:  # none, or not this visitor's
            return ""

    files.change(
        look,
        files,
        place,
        api_visibility="private",
        preprocess=False,
        concurrency_limit=4,
        concurrency_id="thumbnails",
        show_progress="hidden",
        trigger_mode="always_last",
    )
    return place


def pictures_of(named: list[tuple[str, str]], limits) -> list[Upload]:
    """Makes an upload of each file, all at one depth."""
    depth = common_depth([path for path, _ in named], limits)
    return [Upload(name, partial(read_picture, path, name, limits, depth)) for path, name in named]


def pictures_in(named: list[tuple[str, str]], limits) -> list[Upload]:
    """Makes an upload of each file, and of each picture in a zip."""
    return expand([path for path, _ in named], limits)
