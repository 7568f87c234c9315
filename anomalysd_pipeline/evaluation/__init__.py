"""Evaluate AnomalySD and its peers on the same shots with the same metrics, in one report."""
