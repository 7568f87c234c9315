"""Evaluating on a data set: ours and its peers on the same shots, scored by the same metrics, in one report."""
