"""Components of this checkpoint. Their code is in pipeline.py, which diffusers runs first."""

import sys

_module = sys.modules["anomalysd_pipeline.prototypes"]
PrototypeExtractor = _module.PrototypeExtractor
PrototypeBank = _module.PrototypeBank
