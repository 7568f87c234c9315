"""Base classes of `AnomalySDPipeline`, one for each thing it does besides inspecting."""
