"""Tell in words what an inspection found."""

from __future__ import annotations

from .folder import Counts, ResultFolder


def summary(folder: ResultFolder, counts: Counts) -> str:
    """Sums up the findings in a line, and names the defective files, worst first."""
    parts = [f"{counts.inspected} inspected"]
    if counts.verdicts:
        normal = counts.inspected - counts.defective
        parts.append(f"{counts.defective} defective, {normal} normal at the threshold {counts.threshold:.6g}")
    else:
        parts.append("no verdicts, because there is no threshold without --normal or a calibrated --adaptation")
    if counts.failed:
        parts.append(f"{counts.failed} could not be read")
    if counts.unscored:
        parts.append(f"{counts.unscored} without a score, see the column `error`")
    lines = [f"{'; '.join(parts)}. Results in {folder.folder}"]
    if counts.worst:
        lines += ["Defective, worst first:", *(f"{score:10.6g}  {file}" for file, score in counts.worst)]
    if counts.defective > len(counts.worst):
        lines.append(f"and {counts.defective - len(counts.worst)} more, see results.csv")
    return "\n".join(lines)
