"""The tab Inspect: one picture, its verdict and heatmap, and the files to take home."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from ..app import views
from .desk import Desk, Visit, sentences
from .style import OPACITY_JS

PRESETS = [("Fast", "fast"), ("As in the paper, slower", "paper")]
ANY_PART = "Any part"


@dataclass(frozen=True)
class InspectTab:
    """Names the components that other tabs change."""

    picture: gr.Image
    part: gr.Dropdown


def build(desk: Desk, key: gr.State) -> InspectTab:
    """Builds the contents of the tab, and the function `inspect` for programs."""
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            picture = gr.Image(
                label="Picture",
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard", "webcam"],
                height=300,
                elem_id="inspect-picture",
            )
            part = gr.Dropdown(
                [ANY_PART],
                value=ANY_PART,
                label="Part",
                info="One that you have taught. Any other name works too: its words guide the repainting.",
                allow_custom_value=True,
                elem_id="inspect-part",
            )
            preset = gr.Radio(PRESETS, value="fast", label="Thoroughness", elem_id="inspect-preset")
            run = gr.Button("Inspect", variant="primary", elem_id="inspect-run")
        with gr.Column(scale=6, min_width=320):
            verdict = gr.HTML(
                views.waiting("Give a picture, and the verdict will appear here."), elem_id="inspect-verdict"
            )
            gauge = gr.HTML(views.gauge(), elem_id="inspect-gauge")
            heatmap = gr.HTML(views.no_heatmap(), elem_id="inspect-heatmap")
            good = gr.Button("This one is good", size="sm", interactive=False, elem_id="inspect-good")
            opacity = gr.Slider(0, 100, value=60, step=1, label="Heatmap opacity (%)", elem_id="inspect-opacity")
    with gr.Row():
        with gr.Column(min_width=320):
            compare = gr.ImageSlider(
                label="Before and after repainting",
                interactive=False,
                height=380,
                max_height=360,
                elem_id="inspect-compare",
            )
        with gr.Column(min_width=320):
            masks = gr.Gallery(
                label="Masks",
                columns=3,
                height=240,
                object_fit="contain",
                elem_id="inspect-masks",
                interactive=False,
            )
    downloads = gr.File(
        label="To take home: map and report",
        file_count="multiple",
        interactive=False,
        height=250,
        elem_id="inspect-downloads",
    )

    @sentences
    def show(key, part, picture, preset, request: gr.Request):
        visit = desk.visit(key, request)
        return everything(visit, _inspect(desk, visit, part, picture, preset))

    @sentences
    def learn(key, part, picture, preset, request: gr.Request):
        visit = desk.visit(key, request)
        _accept(desk, visit, part, picture)
        return everything(visit, _inspect(desk, visit, part, picture, preset))

    def everything(visit, found):
        result = found.result
        return (
            visit.key,
            views.verdict(found.sentence, result.is_defective, found.remedy),
            views.gauge(result.score, result.threshold),
            views.heatmap(
                result.image, result.anomaly_map, result.threshold, _maximum(result.threshold), result.predicted
            ),
            gr.Button(interactive=result.threshold is not None),
            _compared(desk, visit, result),
            _masks(desk, visit, found),
            _files(desk, visit, found),
        )

    shown = [key, verdict, gauge, heatmap, good, compare, masks, downloads]
    for button, function in ((run, show), (good, learn)):
        button.click(
            function,
            [key, part, picture, preset],
            shown,
            api_visibility="private",
            preprocess=False,
            concurrency_limit=24,
            concurrency_id="inspect",
            show_progress_on=[verdict],
        )
    opacity.input(None, opacity, None, js=OPACITY_JS)

    @sentences
    def inspect(key, picture, part, preset, request: gr.Request):
        """Inspects one picture.

        Args:
            picture: a picture file: BMP, GIF, JPEG, PNG, TIFF or WebP.
            part: a part that this client has taught, "Any part", or any other name.
            preset: "fast" or "paper".

        Returns:
            `{"verdict", "is_defective", "score", "threshold", "times_threshold", "seconds", "settings", ...}`; the
            threshold, its multiple and the verdict are null for a part without one. Then the files: map as 16-bit
            PNG and .npy, report as PNG and PDF.
        """
        visit = desk.visit(key, request)
        found = _inspect(desk, visit, part, picture, preset)
        return visit.key, found.values(), _files(desk, visit, found)

    @sentences
    def accept(key, picture, part, request: gr.Request):
        """Counts a picture as one of a good part: the threshold of a part that this client has taught follows.

        Args:
            picture: a picture file: BMP, GIF, JPEG, PNG, TIFF or WebP.
            part: a part that this client has taught.

        Returns:
            `{"threshold", "pictures", "is_guess"}`: the new threshold, and how many pictures it rests on.
        """
        visit = desk.visit(key, request)
        record = _accept(desk, visit, part, picture)
        told = {name: record[name] for name in ("threshold", "pictures")}
        return visit.key, {**told, "is_guess": not record["held_out"]}

    with gr.Column(visible=False):
        answer, files, call = gr.JSON(label="result"), gr.File(label="files", file_count="multiple"), gr.Button()
        threshold, confirm = gr.JSON(label="threshold"), gr.Button()
    confirm.click(
        accept,
        [key, picture, part],
        [key, threshold],
        api_name="accept",
        preprocess=False,
        concurrency_limit=24,
        concurrency_id="inspect",
    )
    call.click(
        inspect,
        [key, picture, part, preset],
        [key, answer, files],
        api_name="inspect",
        preprocess=False,
        concurrency_limit=24,
        concurrency_id="inspect",
    )
    return InspectTab(picture, part)


def _inspect(desk: Desk, visit: Visit, part, picture, preset):
    from .uploads import read_picture
    from .work import inspect_one

    path, name = desk.upload_of(visit.visitor, picture, "picture")
    return inspect_one(visit.session, desk.turns, part, read_picture(path, name, desk.limits), name, preset)


def _accept(desk: Desk, visit: Visit, part, picture) -> dict:
    from .uploads import read_picture
    from .work import accept

    path, name = desk.upload_of(visit.visitor, picture, "picture")
    return accept(visit.session, desk.turns, part, read_picture(path, name, desk.limits))


def _maximum(threshold: float | None) -> float | None:
    from ..inspection.result import UNCALIBRATED_MAXIMUM

    return UNCALIBRATED_MAXIMUM if threshold is None else None


def _compared(desk: Desk, visit: Visit, result) -> tuple[str, str]:
    folder = desk.new_folder(visit)
    pair = []
    for name, image in (("picture", result.image), ("repainted", result.inpainted)):
        path = folder / f"{name}.webp"
        views.shrunk(image).save(path, quality=90, method=2)
        pair.append(str(path))
    return tuple(pair)


def _masks(desk: Desk, visit: Visit, found) -> list[tuple[str, str]]:
    """Draws the cells, and the proposed and the predicted region, as light on the darkened picture."""
    scales = found.settings["mask_scales"]
    folder = desk.new_folder(visit)
    cells = folder / "cells.webp"
    grid(found.result.image, scales).save(cells, quality=88, method=2)
    shown = [(str(cells), "Multi-scale cells")]
    regions = {}
    if found.proposed is not None:
        regions["By the prototypes"] = found.proposed
    if found.result.threshold is not None:
        regions["Above the threshold"] = found.result.predicted
    for number, (title, region) in enumerate(regions.items()):
        path = folder / f"mask_{number}.webp"
        lit(found.result.image, region).save(path, quality=88, method=2)
        shown.append((str(path), title))
    return shown


def grid(image, scales):
    """Draws the borders of the multi-scale masks on a picture, thinner for finer ones."""
    from PIL import ImageDraw

    small = views.shrunk(image)
    draw = ImageDraw.Draw(small)
    width, height = small.size
    for scale in sorted(scales, reverse=True):
        line = max(1, round(max(small.size) / 100 / scale**0.5))
        for number in range(1, scale):
            x, y = number * width / scale, number * height / scale
            draw.line([(x, 0), (x, height)], fill=(45, 212, 191), width=line)
            draw.line([(0, y), (width, y)], fill=(45, 212, 191), width=line)
    return small


def lit(image, region):
    """Darkens a picture outside of a region.

    Args:
        image: RGB, W x H.
        region: bool [H, W].

    Returns:
        An RGB picture, as large as `views.shrunk` makes it.
    """
    from PIL import Image

    small = views.shrunk(image)
    mask = Image.fromarray(region).convert("L").resize(small.size)
    return Image.composite(small, small.point(lambda value: value // 3), mask)


def _files(desk: Desk, visit: Visit, found) -> list[str]:
    from .downloads import ReportFacts, inspection_files

    facts = ReportFacts(found.part, found.file, desk.models.titles[visit.base], found.settings)
    return [str(path) for path in inspection_files(found.result, facts, desk.new_folder(visit))]
