"""Components of this checkpoint. Their code is in pipeline.py, which diffusers runs first."""

import sys

_module = sys.modules["anomalysd_pipeline.adapters"]
AdapterStore = _module.AdapterStore
