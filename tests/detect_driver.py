"""Inspections of many pictures that are killed with SIGKILL and resumed, for `test_detect.py`.

    OMP_NUM_THREADS=1 python -m tests.detect_driver WORK ARGUMENT ...

The arguments are those of `detect`, without `--out`. Prints what happened as JSON: for each operation on the results'
folder before which a run was killed, what was there, and whether the resumed run gave the table of a whole one. The
parent imports everything and forks a child for each run, because importing takes longer than all runs together; it has
to have one thread alone: others would not survive a fork.
"""

import csv
import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from anomalysd_pipeline import detect
from anomalysd_pipeline.inspection import run as detect_run
from anomalysd_pipeline.inspection.folder import ResultFolder

from .conftest import make_tiny_pipeline

WRITING = os.O_WRONLY | os.O_RDWR


def child(arguments: list[str], out: Path, kill_before: int | None) -> int:
    """One run that is killed before its `kill_before`-th operation on `out`; their names go to `out`.operations."""
    operations = []

    def note(name: str) -> None:
        if len(operations) == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        operations.append(name)

    def on_audit(event: str, found: tuple) -> None:
        # Python announces every file operation so, before it happens.
        writes = event == "open" and isinstance(found[2], int) and found[2] & WRITING
        if (writes or event in ("os.rename", "os.remove")) and str(found[0]).startswith(str(out)):
            note(event)

    append = ResultFolder._append

    def noted_append(folder, row) -> None:
        note("row")
        append(folder, row)

    ResultFolder._append = noted_append
    sys.addaudithook(on_audit)
    status = detect.main([*arguments, "--out", str(out)])
    out.with_suffix(".operations").write_text(json.dumps(operations))
    return status


def run(arguments: list[str], out: Path, kill_before: int | None = None) -> int | None:
    """The exit status of a child; None where it was killed."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            status = child(arguments, out, kill_before)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitpid(process, 0)[1]
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def table(out: Path) -> list[dict]:
    """The table of results without what no two runs share."""
    with open(out / "results.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def main() -> None:
    work, arguments = Path(sys.argv[1]), sys.argv[2:]
    pipe = make_tiny_pipeline(preset_overrides={"fast": {"num_inference_steps": 3, "mask_scales": [1]}})
    detect_run.load_pipeline = lambda *args, **options: pipe  # a child has a copy of its own
    arguments += ["--device", "cpu"]
    gc.freeze()  # spares the children from looking through what they inherit
    whole = work / "whole"
    assert run(arguments, whole) == 0
    expected = table(whole)
    montage = (whole / "montage.png").read_bytes()
    told = []
    operations = json.loads(whole.with_suffix(".operations").read_text())
    for number, operation in enumerate(operations):
        out = work / f"killed-{number}"
        killed = run(arguments, out, number) is None
        rows = sum(path.read_bytes().count(b"\n") for path in out.glob("rows/*.jsonl"))
        status = run([*arguments, "--resume"], out)
        told.append(
            {
                "operation": operation,
                "killed": killed,
                "rows": rows,
                "status": status,
                "equal": table(out) == expected,
                "montage": (out / "montage.png").read_bytes() == montage,
                "repeated": sum(path.read_bytes().count(b"\n") for path in out.glob("rows/*.jsonl")) - len(expected),
                "partial": [path.name for path in out.rglob("*.partial")],
            }
        )
    print(json.dumps(told))


if __name__ == "__main__":
    main()
