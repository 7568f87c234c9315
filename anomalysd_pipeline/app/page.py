"""The whole page: its tabs and sessions, and the way it is served."""

from __future__ import annotations

import html
import threading

import gradio as gr
from gradio.utils import get_function_description
from gradio_client.utils import is_file_obj_with_meta, traverse
from starlette.middleware import Middleware

from ..app import about_tab, batch_tab, gallery_tab, inspect_tab, style, teach_api, teach_tab
from .desk import GRACE_SECONDS, Desk, sentences
from .handouts import Door
from .limits import Limits
from .model import Models
from .shares import Shares
from .space import links
from .stored import StoredExamples

TITLE = """# AnomalySD
Finds defects on industrial parts from zero to a handful of normal pictures: the part is repainted as it should look,
and where the picture differs from that, something is likely to be wrong."""
STEPS = """<ol><li><b>Teach</b> a part from 1 to 8 pictures of good ones</li>
<li><b>Inspect</b> pictures of others, one by one or as a <b>Batch</b></li></ol>"""
HOUR = 3600
WARM_UP_SECONDS = 1.5
"""Delay of loading the model, which takes the processor for seconds: the page comes first."""
WELCOME_BACK = (
    "**Welcome back.** Each page is a session of its own: parts that you taught on another one, or before a reload, "
    "are not here. Those of a page that you have left wait for {minutes:.0f} minutes."
)

TYPES = {"part": ("string", "str"), "false_alarm_rate": ("number", "float"), "bit_depth": ("integer", "int")}
"""Kinds of arguments, in JSON and in Python, for which the page offers a list."""

UNUSABLE = (
    "A file or value of this call cannot be used; give files that you have uploaded, and values of the kind that the "
    "function takes."
)


class Page(gr.Blocks):
    """Serves the page as this app must be served, whether an app file, a Space or a test launches it."""

    desk: Desk

    def launch(self, *args, **kwargs):
        """Launches the page as `gr.Blocks.launch` does, with the look, the bounds and the door of this app.

        Args:
            root_path: path at which a proxy serves the app, such as "/anomalysd"; or set `GRADIO_ROOT_PATH`.
        """
        app_kwargs = dict(kwargs.pop("app_kwargs", None) or {})
        shares = Shares(self.desk.limits.visitor_bytes, self.desk.limits.upload_seconds)
        door = Middleware(Door, handouts=lambda: self.desk.handouts, shares=shares)
        app_kwargs["middleware"] = [door, *app_kwargs.get("middleware", [])]
        defaults = {
            "max_file_size": self.desk.limits.upload_bytes,
            "theme": style.theme(),
            "css": style.CSS,
            "head": style.HEAD,
            "ssr_mode": False,
            "max_threads": 64,
            "footer_links": ["api"],
            "mcp_server": False,  # what is taught belongs to a session, and an agent's calls have none
            # Otherwise gradio opens its own page first, and fails where a busy machine takes 3 seconds for it.
            "_frontend": False,
        }
        self.desk.sweep()
        timer = threading.Timer(WARM_UP_SECONDS, self.desk.warm_up)
        timer.daemon = True
        timer.start()
        return super().launch(*args, **{**defaults, **kwargs, "app_kwargs": app_kwargs})

    def get_api_info(self, *args, **kwargs):
        """Describes the functions for programs as `gr.Blocks.get_api_info` does, their arguments in our words."""
        info = super().get_api_info(*args, **kwargs)
        functions = {f"/{function.api_name}": function.fn for function in self.fns.values()}
        for name, endpoint in info["named_endpoints"].items():
            _, told, _ = get_function_description(functions[name])
            for parameter in endpoint["parameters"]:
                argument = parameter["parameter_name"]
                if argument in TYPES:  # the page's lists are proposals
                    kind = TYPES[argument]
                    parameter |= {"type": {"type": kind[0]}, "python_type": {"type": kind[1]}}
                words = told.get(argument, "")
                parameter["python_type"]["description"] = words[:1].upper() + words[1:]
        return info

    async def preprocess_data(self, *args, **kwargs):
        """Checks a call's values as `gr.Blocks.preprocess_data` does, and refuses them with a sentence."""
        try:
            return await super().preprocess_data(*args, **kwargs)
        except gr.Error:
            raise
        # A stranger's values can cause any error in gradio's checks, and its words may name paths of the server.
        except Exception as error:
            raise gr.Error(UNUSABLE, print_exception=False) from error


def build(limits: Limits | None = None, models: Models | None = None) -> Page:
    """Builds the page.

    Args:
        limits: bounds; None: those of the environment.
        models: bases; None: those of this process.
    """
    desk = Desk(limits, models)
    with Page(title="AnomalySD: find defects", analytics_enabled=False, delete_cache=(HOUR, 2 * HOUR)) as page:
        page.desk = desk

        def leave(key) -> None:
            desk.leave(key)

        # Only the key of the session; both the session and this state stay on the server. The callback is a plain
        # function: gradio copies its config for every request, and with a bound method the desk and all its models.
        key = gr.State(time_to_live=desk.limits.idle_seconds, delete_callback=leave)
        stored = _stored(desk, key)
        gr.Markdown(TITLE, elem_id="title")
        addresses = "".join(f"<a href='{url}' target='_blank'>{name}</a>" for name, url in links().items())
        gr.HTML(f"<div class='steps'>{STEPS}<p class='links'>{addresses}</p></div>", elem_id="steps")
        with gr.Row(elem_id="note", visible=False) as note:
            with gr.Column(scale=4, min_width=300):
                said = gr.Markdown("")
            again = gr.Button("Go on with these parts", size="sm", scale=0, min_width=220, elem_id="take-up")
        with gr.Tabs(selected="inspect") as tabs:
            with gr.Tab("Inspect", id="inspect"):
                inspecting = inspect_tab.build(desk, key, stored, tabs)
            with gr.Tab("Teach", id="teach") as teaching:
                pass
            with gr.Tab("Batch", id="batch"):
                batch_part = batch_tab.build(desk, key)
            with gr.Tab("Gallery", id="gallery"):
                gallery_tab.build(stored, inspecting.picture, tabs)
            with gr.Tab("About", id="about") as about:
                pass
            parts = [inspecting.part, batch_part]
            with teaching:
                teach_tab.build(desk, key, inspecting, batch_part, tabs)
            with about:
                about_tab.build(desk, key, parts, about)

        def greet(request: gr.Request):
            if not desk.has_taught(request):
                return gr.skip(), gr.skip()
            return gr.Row(visible=True), WELCOME_BACK.format(minutes=GRACE_SECONDS / 60)

        @sentences
        def take_up(key, request: gr.Request):
            visit = desk.take_up(key, request)
            last = list(visit.session.parts)[-1]
            lists = [gr.Dropdown(choices=teach_api.choices(visit), value=last) for _ in parts]
            gr.Info(f"You go on with {', '.join(f'“{html.escape(name)}”' for name in visit.session.parts)}.")
            return visit.key, gr.Row(visible=False), *lists

        def closed(request: gr.Request) -> None:
            desk.gone(request)

        again.click(take_up, key, [key, note, *parts], api_visibility="private", show_progress="hidden")
        page.load(greet, None, [note, said], api_visibility="private", queue=False, show_progress="hidden")
        page.unload(closed)
    desk.handouts.publish(_own_files(page))
    return page.queue(max_size=256, default_concurrency_limit=8)


def _stored(desk: Desk, keeper: gr.State) -> StoredExamples | None:
    """Reads the ready examples; the app is of use without them."""
    try:
        return StoredExamples(desk, keeper)
    except ValueError:
        return None


def _own_files(page: gr.Blocks) -> list[str]:
    """Lists the files that the page is built with: examples and icons."""
    found = []
    traverse(page.config, lambda file: found.append(file["path"]), is_file_obj_with_meta)
    return found
