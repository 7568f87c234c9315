"""The app: inspect a picture, teach it a part of your own, inspect a batch. `python app.py`, or the entry of a Space.

`ANOMALYSD_MODEL` names another checkpoint, a Hub id or a folder; without it the embedded one is used.
`ANOMALYSD_MAX_...` change the bounds of `anomalysd_pipeline.app.limits`, and `GRADIO_ROOT_PATH` says where a proxy
serves the app. See docs/app.md.
"""

from anomalysd_pipeline.app import space

with space.prepared():
    from anomalysd_pipeline.app.page import build

    demo = build()

if __name__ == "__main__":
    demo.launch()
