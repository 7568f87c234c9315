"""The tab Gallery: ready examples, each shown at once because its result is stored."""

from __future__ import annotations

import functools

import gradio as gr
from gradio.processing_utils import save_pil_to_cache

from ..app import views
from .desk import Desk
from .inspect_tab import lit

TEXT = (
    "Parts drawn by this project's own code, inspected with the embedded model after it had seen four good pictures "
    "of each. Select one."
)


def build(desk: Desk, picture: gr.Image, tabs: gr.Tabs) -> None:
    """Builds the contents of the tab.

    Args:
        desk: publishes the pictures.
        picture: component that takes an example to be inspected anew.
        tabs: switched to the tab of `picture` then.
    """
    from .gallery import load_examples

    try:
        examples = load_examples()
    except ValueError:  # the app is of use without them
        gr.Markdown("There are no ready examples in this installation.")
        return
    chosen = gr.State(0)
    gr.Markdown(TEXT, elem_classes="help")
    gallery = gr.Gallery(
        [(str(example.path), example.title) for example in examples],
        label="Examples",
        columns=4,
        height=300,
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

    def published(component: gr.ImageSlider | gr.Gallery, image) -> str:
        """Saves a picture for everybody, for as long as the app runs; returns its path."""
        path = save_pil_to_cache(image, cache_dir=component.GRADIO_CACHE, format=component.format)
        component.keep_in_cache.add(path)
        desk.handouts.publish([path])
        return path

    @functools.cache
    def drawn(number: int) -> tuple:
        example = examples[number]
        regions = {
            "By the prototypes": example.prototype_mask,
            "Above the threshold": example.predicted,
        }
        return (
            views.verdict(example.sentence, example.is_defective, example.title),
            views.gauge(example.score, example.threshold),
            views.heatmap(example.image, example.anomaly_map, example.threshold, region=example.predicted),
            tuple(published(compare, image) for image in (example.image, example.inpainted)),
            [(published(masks, lit(example.image, region)), title) for title, region in regions.items()],
        )

    def select(event: gr.SelectData):
        number = event.index if isinstance(event.index, int) and 0 <= event.index < len(examples) else 0
        return number, *drawn(number), gr.Button(interactive=True)

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
