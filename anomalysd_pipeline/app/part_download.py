"""The button that hands out a part's file, written anew whenever something was learned of the part."""

from __future__ import annotations

import gradio as gr

from .desk import Desk, Visit


def renewed(desk: Desk, visit: Visit, part: str) -> gr.DownloadButton:
    """Writes the file of a part, and gives it to the button."""
    return gr.DownloadButton(f"Download “{part}”", value=written(desk, visit, part), interactive=True)


def written(desk: Desk, visit: Visit, part: str) -> str:
    """Writes all that was learned of a part into a file for its visitor; returns the path."""
    from .downloads import part_file
    from .uploads import safe_name

    path = desk.new_folder(visit) / f"{safe_name(part)}.safetensors"
    with desk.turns.turn():
        return str(part_file(visit.session.pipe, part, path))
