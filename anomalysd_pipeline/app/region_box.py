"""The box in the tab Inspect where a part's region of interest is drawn on one of its good pictures."""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from ..app import figures, views
from .desk import Desk, sentences
from .fields import Faults
from .part_download import renewed

HELP = (
    "Where only some of the picture matters, click its corners: two opposite ones of a rectangle, or three and more "
    "around it. Outside of it nothing counts then, in learning and in inspection, for pictures of the same view."
)
NONE_YET = "Teach a part and choose it above; a good picture of it will appear here."
TEMPLATE = """<div class="region">${value && value.picture
  ? `<div class="drawn"><img src="${value.picture}" alt="A good picture of the part">
     <svg viewBox="0 0 1 1" preserveAspectRatio="none"><polygon points="${value.points || ''}"></polygon></svg>
     ${value.corners.map(at => `<i style="left:${100 * at[0]}%;top:${100 * at[1]}%"></i>`).join('')}</div>`
  : `<p>${value ? value.text : ''}</p>`}</div>"""
DRAW_JS = """element.addEventListener('click', event => {
  const image = element.querySelector('img');
  if (!image) return;
  const box = image.getBoundingClientRect();
  const at = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  if (at.some(share => share < 0 || share > 1)) return;
  const corners = [...props.value.corners, at.map(share => Math.round(1e4 * share) / 1e4)];
  const [a, b] = corners;
  const outline = corners.length === 2 ? [a, [b[0], a[1]], b, [a[0], b[1]]] : corners;
  props.value = {...props.value, corners, points: outline.map(corner => corner.join()).join(' ')};
});"""
AGAIN_JS = "(drawn) => drawn && {...drawn, corners: [], points: ''}"
CORNERS_JS = "(key, part, drawn) => [key, part, drawn ? drawn.corners : []]"
NO_CORNERS_JS = "(key, part, drawn) => [key, part, []]"


def build(
    desk: Desk,
    key: gr.State,
    part: gr.Dropdown,
    results: list,
    download: gr.DownloadButton,
    faults: Faults,
    cleared: Callable[[str], tuple],
) -> None:
    """Builds the box, and the function `set_region` for programs.

    Args:
        desk: gives sessions and turns.
        key: state that holds the key of the page's session.
        part: the part that is chosen in the tab.
        results: results of the tab, which another region clears; the first is the verdict.
        download: the button for the part's file, which is written anew.
        faults: places of errors of the tab; this box adds its own.
        cleared: gives the values of cleared results, with a text in the verdict's place.
    """
    with gr.Accordion("Region of interest (optional)", open=False, elem_id="region") as box:
        gr.Markdown(HELP, elem_classes="help")
        picture = gr.HTML(
            {"text": NONE_YET}, html_template=TEMPLATE, js_on_load=DRAW_JS, label="Region", elem_id="region-picture"
        )
        with gr.Row():
            apply = gr.Button("Look only inside", variant="primary", size="sm", min_width=90, elem_id="region-apply")
            again = gr.Button("Draw anew", size="sm", min_width=90, elem_id="region-again")
            whole = gr.Button("Whole picture", size="sm", min_width=90, elem_id="region-whole")
        faults.beside("region", whole)

    def look(key, part) -> dict:
        """Shows a good picture of the part that is chosen, and the region that it has."""
        return {picture: _drawn(desk.present(key), part)}

    def set_to(key_value, part_name, corners, request: gr.Request):
        from .region_work import set_region

        visit = desk.visit(key_value, request)
        try:
            record = set_region(visit.session, desk.turns, part_name, corners)
        except ValueError as error:
            return {key: visit.key, **faults.said(error)}
        visit.session.shown = None
        count = record["pictures"]
        told = "Only the region counts now." if corners else "The whole picture counts now."
        told += f" The threshold is {record['threshold']:.3f}, from {count} picture{'s' if count > 1 else ''}."
        return {
            key: visit.key,
            **dict(zip(results, cleared(f"{told} Press Inspect for the verdict."), strict=True)),
            picture: _drawn(visit.session, part_name),
            download: renewed(desk, visit, part_name),
            **faults.none(),
        }

    def set_inside(key_value, part_name, corners, request: gr.Request):
        if not corners:
            return faults.said(ValueError("`region` has no corners yet; click at least two on the picture."))
        return set_to(key_value, part_name, corners, request)

    for button, function, values in ((apply, set_inside, CORNERS_JS), (whole, set_to, NO_CORNERS_JS)):
        button.click(
            sentences(function),
            [key, part, picture],
            [key, *results, picture, download, *faults.outputs],
            js=values,
            api_visibility="private",
            preprocess=False,
            concurrency_limit=8,
            concurrency_id="teach",
            show_progress_on=[results[0]],
        )
    again.click(None, picture, picture, js=AGAIN_JS)
    for event in (again.click, part.change):
        event(None, None, faults.place("region"), js="() => ''")
    for event in (box.expand, part.change):
        event(
            look,
            [key, part],
            picture,
            api_visibility="private",
            preprocess=False,
            queue=False,
            show_progress="hidden",
        )
    _add_api(desk, key, part)


def _drawn(session, part) -> dict:
    """Gives the value of the picture on which corners are set; what does not count is darkened in it."""
    from ..data.region import unpack_region
    from .region_work import good_pictures

    if session is None or not isinstance(part, str) or part not in session.parts:
        return {"text": NONE_YET}
    pictures = good_pictures(session, part)
    if not pictures:
        return {"text": "The good pictures of this part were not kept; teach it here to draw a region."}
    region = session.pipe.config.categories[part].get("region")
    shown = views.shrunk(pictures[0]) if region is None else figures.lit(pictures[0], unpack_region(region).numpy())
    return {"picture": views.data_uri(shown), "corners": [], "points": ""}


def _add_api(desk: Desk, key: gr.State, part: gr.Dropdown) -> None:
    @sentences
    def set_region(key, part, region, request: gr.Request):
        """Sets the region of interest of a part; outside of it nothing counts. The threshold is set anew.

        Args:
            part: a part that this client has taught.
            region: corners [x, y] as shares of width and height, two of a rectangle or more around it; [] for the
                whole picture.

        Returns:
            `{"threshold", "pictures", "is_guess"}`: the new threshold, and how many pictures it rests on.
        """
        from .region_work import set_region
        from .work import threshold_facts

        visit = desk.visit(key, request)
        record = set_region(visit.session, desk.turns, part, region)
        return visit.key, threshold_facts(record)

    with gr.Column(visible=False):
        region, answer, call = gr.JSON(label="region"), gr.JSON(label="threshold"), gr.Button()
    call.click(
        set_region,
        [key, part, region],
        [key, answer],
        api_name="set_region",
        preprocess=False,
        concurrency_limit=8,
        concurrency_id="teach",
    )
