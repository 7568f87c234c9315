"""The app, started by `python app.py` or by a Space: inspects pictures and batches, and teaches parts.

`ANOMALYSD_MODEL` names a checkpoint other than the embedded one, as Hub id or folder. `ANOMALYSD_MAX_...` change the
bounds of `anomalysd_pipeline.app.limits`. `GRADIO_ROOT_PATH` is the path at which a proxy serves the app. See
docs/app.md.
"""

from anomalysd_pipeline.app import space

with space.prepared():
    from anomalysd_pipeline.app.page import build

    demo = build()

if __name__ == "__main__":
    demo.launch()
