"""The app: show it good parts, upload a picture, see where it is defective. `python app.py`, or the entry of a Space.

`ANOMALYSD_MODEL` names another checkpoint, a Hub id or a folder; without it the embedded one is used.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr
from PIL import Image

MAX_NORMAL = 8
UNKNOWN_PART = "part"
HOUR = 3600

INTRODUCTION = """
# AnomalySD
Finds defects on industrial parts from zero to a handful of normal pictures. The model repaints the part as it
should look; where the picture differs from that, something is likely to be wrong.
"""
EMBEDDED_NOTE = """
**About the model.** This is the small model that comes with the code, so that it runs on any laptop. It shows
the method at work and does not reach the paper's accuracy, for which Stable Diffusion and a GPU are needed.
"""
PRIVACY_NOTE = "What you upload and what is learned from it is yours alone, and deleted within two hours."


@dataclass
class Session:
    """What one visitor has taught: a pipeline of their own, and the normal pictures behind each part."""

    pipe: object
    normals: dict[str, list] = field(default_factory=dict)


@functools.cache
def load_base():
    """The pipeline whose weights all sessions share; made at first use, because it takes many seconds."""
    import torch

    from anomalysd_pipeline import AnomalySDPipeline

    pipe = AnomalySDPipeline.from_pretrained(os.environ.get("ANOMALYSD_MODEL") or None)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def session_pipeline(base):
    """A pipeline with the weights of `base`, but a bank, adaptations and settings of its own."""
    own = {"bank": copy.deepcopy(base.bank), "adapters": copy.deepcopy(base.adapters)}
    components = {**base.components, **own}
    accepted = inspect.signature(type(base)).parameters
    settings = {key: value for key, value in base.config.items() if key in accepted and key not in components}
    return type(base)(**components, **settings)


def shows_errors(function):
    """Shows a ValueError to the visitor as the sentence it is."""

    @functools.wraps(function)
    def wrapped(*args):
        try:
            return function(*args)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return wrapped


def read_upload(upload: dict):
    """An uploaded file as an RGB picture; an error names the visitor's file, not its place on the server."""
    from anomalysd_pipeline.data import load_image

    path = upload["path"]
    try:
        return load_image(path)
    except ValueError as error:
        raise ValueError(str(error).replace(f"`source` '{path}'", f"'{Path(path).name}'")) from error


@shows_errors
def learn(
    session: Session | None,
    name: str,
    uploads: list[dict] | None,
    preset: str,
    fine_tune: bool = False,
    progress=gr.Progress(track_tqdm=True),
):
    """Learns a part from 1 to 8 normal pictures: its prototypes and its threshold, and on request its repainting."""
    from anomalysd_pipeline.inspection import register

    uploads = uploads or []
    if not 1 <= len(uploads) <= MAX_NORMAL:
        raise ValueError(f"`normal pictures` must be 1 to {MAX_NORMAL} pictures, but {len(uploads)} were given.")
    images = [read_upload(upload) for upload in uploads]
    session = session or Session(session_pipeline(load_base()))
    size = (session.pipe.config.resolution,) * 2
    # At the size the model sees: a visitor's eight large photographs must not stay in memory.
    images = [image.resize(size, Image.Resampling.LANCZOS) for image in images]
    name = name.strip()
    if fine_tune:

        def show(state) -> None:
            progress(state.share, f"Fine-tuning the {state.stage}: {state.seconds_left:.0f} s left")

        session.pipe.adapt({name: images}, calibrate=False, callback=show)
        session.pipe.calibrate(name, images, preset=preset)
    else:
        register(session.pipe, name, images, preset=preset)
    session.normals[name] = images
    choices = list(dict.fromkeys([UNKNOWN_PART, *session.pipe.categories]))
    message = f"Learned **{name}** from {len(images)} picture{'s' if len(images) > 1 else ''}. Now inspect one."
    return session, gr.Dropdown(choices=choices, value=name), message


@shows_errors
def inspect_picture(
    session: Session | None, part: str, upload: dict | None, preset: str, progress=gr.Progress(track_tqdm=True)
):
    """Inspects a picture of a learned part, or of any other without a threshold."""
    from anomalysd_pipeline.inspection import inspect as run

    if not upload:
        raise ValueError("`picture` is missing; upload the picture to inspect.")
    image = read_upload(upload)
    pipe = session.pipe if session else load_base()
    if session and part in session.normals:
        record = pipe.config.categories[part]["calibration"]
        # A threshold holds for the settings it was found at, and the visitor may have changed the preset since.
        if record["settings"] != pipe.settings(preset=preset, category=part).to_dict():
            pipe.calibrate(part, session.normals[part], preset=preset)
    result = run(pipe, image, part, preset=preset)
    return result.sentence, result.score, result.overlay(), result.inpainted


def build() -> gr.Blocks:
    """The page."""
    model = os.environ.get("ANOMALYSD_MODEL")
    with gr.Blocks(title="AnomalySD", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        session = gr.State(time_to_live=HOUR)
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column():
                gr.Markdown("### 1. Show it good parts")
                name = gr.Textbox(label="Name of the part", placeholder="hex nut", max_lines=1)
                normals = gr.File(
                    label=f"Normal pictures (1 to {MAX_NORMAL})",
                    file_count="multiple",
                    file_types=["image"],
                    height=140,
                )
                fine_tune = gr.Checkbox(
                    label="Fine-tune the model on these pictures",
                    info="Repaints this part better; takes a few minutes without a GPU.",
                )
                learn_button = gr.Button("Learn this part")
                learned = gr.Markdown(
                    "You can skip this step; without normal pictures there is a heatmap but no verdict."
                )
                gr.Markdown("### 2. Inspect a picture")
                part = gr.Dropdown(
                    [UNKNOWN_PART],
                    value=UNKNOWN_PART,
                    label="Part",
                    info="A part you have shown, or any other name: its words guide the repainting.",
                    allow_custom_value=True,
                )
                picture = gr.Image(label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"])
                preset = gr.Radio(
                    [("Fast", "fast"), ("As in the paper, slower", "paper")], value="fast", label="Thoroughness"
                )
                inspect_button = gr.Button("Inspect", variant="primary")
            with gr.Column():
                verdict = gr.Textbox(label="Verdict", interactive=False)
                score = gr.Number(label="Score", interactive=False, precision=4)
                heat = gr.Image(label="Heatmap", format="png", interactive=False)
                repainted = gr.Image(label="The part as it should look", format="png", interactive=False)
        gr.Markdown(f"**Model:** {model}" if model else EMBEDDED_NOTE)
        gr.Markdown(PRIVACY_NOTE)

        # Uploads reach the functions as files, unread: gradio's own reading converts them (16-bit pictures lose their
        # contrast) and answers a damaged one without saying what is wrong.
        shared = {"preprocess": False, "concurrency_limit": 1, "concurrency_id": "model"}
        learn_button.click(
            learn, [session, name, normals, preset, fine_tune], [session, part, learned], api_name="learn", **shared
        )
        inspect_button.click(
            inspect_picture,
            [session, part, picture, preset],
            [verdict, score, heat, repainted],
            api_name="inspect",
            **shared,
        )
    return page.queue(max_size=32)


demo = build()

if __name__ == "__main__":
    demo.launch(max_file_size="20mb")
