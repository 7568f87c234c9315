"""The look of the page: one quiet theme, no fonts from elsewhere, nothing that moves while it loads."""

from __future__ import annotations

import gradio as gr

_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def theme() -> gr.themes.Base:
    """Makes gradio's plain theme in our colors, with system fonts: a font server would learn of visitors."""
    return gr.themes.Base(primary_hue="teal", neutral_hue="slate", radius_size="md", font=_FONT, font_mono=_MONO).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_shadow="none",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        # The lighter ones of the theme are hard to read.
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        color_accent="*primary_700",
    )


OPACITY_JS = "(value) => { document.documentElement.style.setProperty('--heat-opacity', value / 100); }"
TO_VERDICT_JS = """() => { if (window.innerWidth <= 640)
  document.getElementById("inspect-verdict").scrollIntoView({ block: "start" }); }"""
"""Moves a phone's view to the verdict, which is below the inputs there."""

TO_HEATMAPS_JS = TO_VERDICT_JS.replace("inspect-verdict", "batch-gallery")
"""Moves a phone's view to the heatmap of the row that was selected."""

TO_LESSON_JS = """() => document.getElementById("teach-result").scrollIntoView({ block: "nearest" })"""
"""Moves the view to the progress of a lesson, where the button to begin it lies below."""

HEAD = "<meta name='description' content='Finds defects on industrial parts from zero to a handful of good ones.'>"

CSS = """
:root { --heat-opacity: 0.6; --defect: #b42318; --good: #067647; --quiet: #475569; --line: #cbd5e1; --sheet: #ffffff; }
.dark { --defect: #fda29b; --good: #75e0a7; --quiet: #a3b1c6; --line: #3b4a60; --sheet: #111827; }
.gradio-container { max-width: min(1240px, 100vw) !important; min-width: 0 !important; margin: 0 auto !important;
  width: 100% !important; }
.gradio-container > .main { width: 100%; padding-inline: clamp(12px, 2.5vw, 32px) !important; }
.gradio-container footer { padding-block: 0.5rem; }
#title h1 { font-size: 1.6rem; margin: 0.25rem 0 0; }
#title p { color: var(--quiet); margin: 0.15rem 0 0; max-width: 110ch; }
button[role=tab].selected { color: #0f766e !important; } .dark button[role=tab].selected { color: #5eead4 !important; }
.steps { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: center;
  gap: 0.2rem 2rem; }
.steps ol { display: flex; flex-wrap: wrap; gap: 0.2rem 1.5rem; list-style: none; counter-reset: step; margin: 0;
  padding: 0; } .steps li { counter-increment: step; margin: 0; }
.steps li::before { content: counter(step); display: inline-grid; place-items: center; width: 1.35rem; height: 1.35rem;
  margin-right: 0.45rem; border-radius: 50%; background: #0f766e; color: #fff; font-size: 0.8rem; font-weight: 650; }
.links { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin: 0; font-size: 0.92rem; }
.html-container { padding: 0 !important; }
.tabitem, .tab-content { padding-inline: 0 !important; }
.help, .help p { color: var(--quiet); font-size: 0.92rem; max-width: 80ch; }

.verdict { min-height: 5.4rem; padding: 0.8rem 1rem; border: 1px solid var(--line); border-left: 6px solid var(--line);
  border-radius: 8px; background: var(--sheet); box-sizing: border-box; }
.verdict .words { font-size: 1.3rem; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
.verdict .note { margin: 0.35rem 0 0; color: var(--quiet); font-size: 0.92rem; }
.verdict.defective { border-left-color: var(--defect); } .verdict.defective .words { color: var(--defect); }
.verdict.normal { border-left-color: var(--good); } .verdict.normal .words { color: var(--good); }
.verdict.empty .words { color: var(--quiet); font-weight: 450; font-size: 1.05rem; }

.fault-place:not(:has(.fault)) { display: none; }
.fault { margin: 0; color: var(--defect); font-size: 0.92rem; font-weight: 550; overflow-wrap: anywhere; }

.thumbnail-place:not(:has(figure)) { display: none; }
.thumbnails { display: flex; gap: 0.4rem; align-items: center; overflow-x: auto; padding-bottom: 0.3rem; }
.thumbnails figure { margin: 0; flex: none; width: 76px; } .thumbnails p { margin: 0; color: var(--quiet); }
.thumbnails :is(img, .none) { width: 76px; height: 64px; object-fit: cover; border-radius: 6px; display: grid;
  place-items: center; background: rgb(128 128 128 / 0.12); margin: 0; }
.thumbnails figcaption { font-size: 0.7rem; color: var(--quiet); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.thumbnails .bad :is(.none, figcaption) { color: var(--defect); }

.gauge { padding: 0.5rem 0.25rem 0; min-height: 4.6rem; box-sizing: border-box; }
.gauge .scale, .heat-view .colors { height: 14px; border-radius: 7px; background: linear-gradient(90deg, #0d1442,
  #123076 12.5%, #14589e 25%, #1c88b0 37.5%, #68bea0 50%, #f6dd5c 62.5%, #fba02e 75%, #e85822 87.5%, #ba121e); }
.gauge .scale { position: relative; } .gauge .scale.blank { background: var(--line); }
.gauge .mark { position: absolute; left: calc(50% - 1px); top: -4px; width: 2px; height: 22px;
  background: var(--body-text-color); }
.gauge .needle { position: absolute; top: -5px; width: 12px; height: 24px; margin-left: -6px; border-radius: 4px;
  background: #fff; border: 2px solid #0f172a; box-sizing: border-box; }
.labels { display: flex; justify-content: space-between; color: var(--quiet); font-size: 0.8rem; min-height: 1.2rem; }
.labels span { flex: 1; } .labels span:nth-child(2) { text-align: center; }
.labels span:nth-child(3) { text-align: right; }
.gauge .values { font-variant-numeric: tabular-nums; font-size: 0.95rem; }

figure.heat-view, figure.validation { margin: 0; }
.stack { position: relative; height: 400px; background: rgb(128 128 128 / 0.12); border-radius: 8px;
  overflow: hidden; }
.stack img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; margin: 0; }
.stack img.heat { opacity: var(--heat-opacity); }
.stack.empty { display: grid; place-items: center; text-align: center; padding: 1rem; box-sizing: border-box; }
.stack.empty p { color: var(--quiet); margin: 0; }
.heat-view figcaption { padding-top: 0.5rem; }
.heat-view figcaption p { margin: 0; color: var(--quiet); font-size: 0.85rem; }
.region { min-height: 8rem; display: grid; place-items: center; border-radius: 8px;
  background: rgb(128 128 128 / 0.12); }
.region p { margin: 1rem; color: var(--quiet); text-align: center; }
.region .drawn { position: relative; cursor: crosshair; line-height: 0; touch-action: manipulation; }
.region img { max-width: 100%; max-height: 340px; min-width: 160px; margin: 0; border-radius: 6px; }
.region svg { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none; }
.region polygon { fill: rgb(45 212 191 / 0.3); stroke: #0d9488; stroke-width: 3px; vector-effect: non-scaling-stroke; }
.region i { position: absolute; width: 12px; height: 12px; margin: -6px; border-radius: 50%; background: #fff;
  border: 3px solid #0d9488; box-sizing: border-box; pointer-events: none; }
/* The plot takes the place that its label leaves; by itself it is as high as both. */
.loss { display: flex; flex-direction: column; } .loss > :last-child { flex: 1; min-height: 0; height: 0 !important; }
.validation .stack { height: 190px; }
.validation figcaption { color: var(--quiet); font-size: 0.85rem; padding-top: 0.3rem; min-height: 1.6rem; }

.progress .track { height: 12px; border-radius: 6px; background: rgb(128 128 128 / 0.22); overflow: hidden; }
.progress .done { height: 100%; background: #0d9488; transition: width 0.3s; }
.progress p { margin: 0.35rem 0 0; min-height: 1.5rem; font-variant-numeric: tabular-nums; color: var(--quiet); }

dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 0.35rem 1.25rem; margin: 0; }
dl.facts dt { color: var(--quiet); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }

#inspect-verdict, #teach-result { min-height: 5.4rem; }
#inspect-downloads { min-height: 300px; } #batch-downloads { min-height: 140px; }
/* These are results: there is nothing to be removed from them. */
:is(#inspect-downloads, #batch-downloads) .label-clear-button { display: none; }
#batch-table { min-height: 12rem; }
#gallery-verdict .verdict { min-height: 7.7rem; }
#gallery-examples .grid-wrap { height: auto !important; max-height: none !important; }
/* Under the pictures, which it would otherwise cover. */
.thumbnail-lg { display: flex !important; flex-direction: column; }
.thumbnail-lg img { flex: 1; min-height: 0; }
.thumbnail-lg .caption-label { position: static; width: 100%; border: 0; text-align: left; }
#teach-length .wrap { flex-direction: column; }
.caption-label { max-width: 100% !important; white-space: normal !important; overflow-wrap: anywhere;
  line-height: 1.25 !important; }
:is(button, input, textarea, [role=tab]):focus-visible { outline: 3px solid #0d9488 !important; outline-offset: 2px; }
/* There is no server of the Model Context Protocol. */
.snippet:has(img[src*="/mcp-"]) { display: none; }
/* gradio hides its address for programs on a phone. */
/* The label lies over the pictures' top edge otherwise. */
:is(#inspect-masks, #gallery-masks, #batch-gallery) .grid-wrap { padding-top: 1.8rem; }
footer .show-api { display: flex !important; } footer :is(.divider, .show-api-divider) { display: none !important; }
@media (max-width: 640px) {
  #inspect-threshold { min-height: 116px; } #inspect-verdict .verdict { min-height: 11.75rem; }
  .stack { height: 300px; } .validation .stack { height: 150px; }
  .verdict { min-height: 9.5rem; } .progress p { min-height: 3rem; } .gauge { min-height: 4.2rem; }
  .verdict .words { font-size: 1.1rem; } button[role=tab] { padding-inline: 0.4rem !important; font-size: 0.92rem; }
  #title h1 { font-size: 1.35rem; }
  .caption-label { padding: 0.2rem 0.3rem !important; }
  :is(#batch-gallery, #gallery-examples, #gallery-masks) .grid-container {
    grid-template-columns: repeat(2, 1fr) !important; }
  #batch-table { max-width: calc(100vw - 24px); overflow: hidden; }
  #batch-table :is(.table-container, .table-wrap) { max-width: 100%; overflow-x: auto; }
  /* File, verdict and multiple of the threshold have room; the rest is behind them. */
  #batch-table table { width: 560px !important; }
  #batch-table :is(.header-cell, .body-cell) { width: 75px !important; min-width: 75px !important;
    max-width: 75px !important; overflow-wrap: anywhere; font-size: 0.85rem; }
  #batch-table :is(.header-cell, .body-cell):first-child { width: 150px !important; min-width: 150px !important;
    max-width: 150px !important; }
  #batch-table :is(.header-cell, .body-cell):nth-child(2) { width: 95px !important; min-width: 95px !important;
    max-width: 95px !important; }
  #batch-table :is(.header-cell, .body-cell):nth-child(6) { width: 260px !important; min-width: 260px !important;
    max-width: 260px !important; }
}
@media (prefers-reduced-motion: reduce) { .progress .done { transition: none; } }
"""
