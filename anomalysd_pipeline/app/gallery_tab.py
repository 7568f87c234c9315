"""The tab Gallery: ready examples, each shown at once because its result is stored."""

from __future__ import annotations

import gradio as gr

from ..app import views
from .stored import StoredExamples

TEXT = (
    "Parts drawn by this project's own code, inspected with the embedded model after it had seen four good pictures "
    "of each. Select one."
)


def build(stored: StoredExamples | None, picture: gr.Image, tabs: gr.Tabs) -> None:
    """Builds the contents of the tab.

    Args:
        stored: the examples; None: there are none.
        picture: component that takes an example to be inspected anew.
        tabs: switched to the tab of `picture` then.
    """
    if stored is None:
        gr.Markdown("There are no ready examples in this installation.")
        return
    examples = stored.examples
    chosen = gr.State(0)
    gr.Markdown(TEXT, elem_classes="help")
    gallery = gr.Gallery(
        [(str(example.path), example.title) for example in examples],
        label="Examples",
        columns=4,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        elem_id="gallery-examples",
    )
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            verdict = gr.HTML(views.waiting("Select an example."), elem_id="gallery-verdict")
            gauge = gr.HTML(views.gauge(), elem_id="gallery-gauge")
            again = gr.Button("Inspect this picture yourself", interactive=False, elem_id="gallery-again")
            masks = gr.Gallery(
                label="Masks",
                columns=2,
                height=200,
                object_fit="contain",
                interactive=False,
                elem_id="gallery-masks",
            )
        with gr.Column(scale=5, min_width=320):
            heatmap = gr.HTML(views.no_heatmap(), elem_id="gallery-heatmap")
        with gr.Column(scale=5, min_width=320):
            compare = gr.ImageSlider(
                label="Before and after repainting",
                interactive=False,
                height=440,
                max_height=400,
                elem_id="gallery-compare",
            )

    def select(event: gr.SelectData):
        number = event.index if isinstance(event.index, int) and 0 <= event.index < len(examples) else 0
        drawn, example = stored.drawn(number), examples[number]
        heat = drawn.view.html(example.threshold, outlined=example.is_defective)
        return number, drawn.verdict, drawn.gauge, heat, drawn.compare, drawn.masks, gr.Button(interactive=True)

    gallery.select(
        select,
        None,
        [chosen, verdict, gauge, heatmap, compare, masks, again],
        api_visibility="private",
        queue=False,
        show_progress="hidden",
    )

    def send(number):
        return str(examples[number].path), gr.Tabs(selected="inspect")

    again.click(send, chosen, [picture, tabs], api_visibility="private", queue=False, show_progress="hidden")
