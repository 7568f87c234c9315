"""The tab About: the loaded base and its device, and how far its verdicts can be trusted."""

from __future__ import annotations

import gradio as gr

from ..app import views
from .desk import Desk, sentences
from .inspect_tab import ANY_PART
from .model import has_gpu

EMBEDDED = """
**What to expect.** The embedded model is small, so that it runs on any laptop without a download. It was trained on
drawn parts alone and shows the method at work; it repaints softly, misses faint defects, and does not reach the
paper's accuracy, for which Stable Diffusion and a GPU are needed.
"""
METHOD = """
**How it works.** The picture is cut into cells. The model repaints one group of cells after another as a normal part
would look, guided by the surroundings and by a description of the part. Where the picture and its repainted self
differ, a defect is likely. A few pictures of good parts say what the part should look like: where the picture is
unlike them, it is repainted from their patches, and how unlike it is counts in the score, most of it in the embedded
model. They also give the threshold, which makes a verdict out of a score.

**What the score means.** It is the mean of the map's highest values, its highest hundredth in the embedded model, and
keeps one scale for each part: nothing is stretched to the range of a picture. Half of the colors lie below the
threshold, half above it.

**Yours alone.** What you upload and teach is seen by no other visitor. It is deleted ten minutes after you leave,
and after an hour without use in any case.

The method is that of [AnomalySD](https://arxiv.org/abs/2408.01960). The functions of this page can be called from
programs: see *Use via API* at the foot of the page.
"""
NO_GPU = "The full base, Stable Diffusion, needs a GPU, and this machine has none."
SWITCHING = "Another base knows nothing of the parts that you have taught on this one: they are forgotten."


def build(desk: Desk, key: gr.State, parts: list[gr.Dropdown], tab: gr.Tab) -> None:
    """Builds the contents of the tab.

    Args:
        desk: gives the bases and the sessions.
        key: state that holds the key of the page's session.
        parts: lists of parts on other tabs; emptied when the base changes.
        tab: the tab itself; its facts are read again whenever it is opened.
    """
    models = desk.models
    first = models.names[0]
    with gr.Row():
        with gr.Column(min_width=300):
            card = gr.HTML(views.model_card(models.facts(first), models.is_embedded), elem_id="about-model")
            base = gr.Radio(
                [(models.titles[name], name) for name in models.names],
                value=first,
                label="Base",
                info=SWITCHING if len(models.names) > 1 else (NO_GPU if not has_gpu() else None),
                interactive=len(models.names) > 1,
                elem_id="about-base",
            )
        with gr.Column(min_width=320):
            if models.is_embedded:
                gr.Markdown(EMBEDDED)
            gr.Markdown(METHOD)

    def look(key):
        name = key[0] if isinstance(key, tuple) else first
        return views.model_card(models.facts(name), models.is_embedded)

    tab.select(look, key, card, api_visibility="private", queue=False, show_progress="hidden")

    @sentences
    def switch(key, base, request: gr.Request):
        if base not in models.names:
            raise ValueError(f"`base` must be one of {', '.join(models.names)}.")
        models.base(base)
        desk.leave(key)
        visit = desk.visit(None, request, base)
        lists = [gr.Dropdown(choices=[ANY_PART], value=ANY_PART) for _ in parts]
        return visit.key, views.model_card(models.facts(base), models.is_embedded), *lists

    if len(models.names) > 1:
        base.input(switch, [key, base], [key, card, *parts], api_visibility="private", concurrency_limit=1)
