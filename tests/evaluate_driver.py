"""Evaluations killed with SIGKILL and resumed, and evaluations by several processes, for `test_evaluate_runs.py`.

    OMP_NUM_THREADS=1 python -m tests.evaluate_driver kill WORK '[[ARGUMENT, ...], ...]'
    accelerate launch ... -m tests.evaluate_driver together RUNS.json

The arguments are those of `evaluate`, without `--out`. The first prints as JSON what happened: the parent imports
everything and forks a child for each run, because importing takes longer than all runs together. The second takes a
list of [arguments, ...], runs one after the other, and ends with the status of the first that fails; the statuses are
written beside RUNS.json.
"""

import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import peft  # noqa: F401
from accelerate import PartialState

from anomalysd_pipeline import evaluate
from anomalysd_pipeline.evaluation import floors, peers, run, system  # noqa: F401
from anomalysd_pipeline.evaluation.store import Store

WRITING = os.O_WRONLY | os.O_RDWR
TWICE = (2, 3)
"""Rows that are written before each of two kills."""


def child(arguments: list[str], out: Path, kill_before: int | None, after_rows: int | None) -> int:
    """One run, killed before an operation on `out` or after some rows; the operations go to `out`.operations."""
    operations, rows = [], []

    def note(kind: str) -> None:
        if len(operations) == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        operations.append(kind)

    def on_audit(event: str, found: tuple) -> None:
        # Python announces every file operation so, before it happens.
        writes = event == "open" and isinstance(found[2], int) and found[2] & WRITING and ".jsonl" in str(found[0])
        if (writes or event in ("os.rename", "shutil.rmtree")) and str(found[0]).startswith(f"{out}/"):
            folder = Path(str(found[0])).relative_to(out).parts
            note(f"{event} {folder[0].split('.')[1] if folder[0].startswith('.') else folder[0]}")

    add = Store.add

    def noted_add(store, row, anomaly_map) -> None:
        add(store, row, anomaly_map)
        rows.append(row)
        if len(rows) == after_rows:
            os.kill(os.getpid(), signal.SIGKILL)

    Store.add = noted_add
    sys.addaudithook(on_audit)
    status = evaluate.main([*arguments, "--out", str(out)])
    out.with_suffix(".operations").write_text(json.dumps(operations))
    return status


def start(
    arguments: list[str], out: Path, kill_before: int | None = None, after_rows: int | None = None
) -> int | None:
    """The exit status of a child; None where it was killed."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            status = child(arguments, out, kill_before, after_rows)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitpid(process, 0)[1]
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def kill(work: Path, floor: list[str], ours: list[str], adapted: list[str]) -> dict:
    """Of a floor, a run killed for the first operation of each kind, and resumed; of ours, one killed twice that is
    left as it is. Of both, and one that adapts, a whole one."""
    assert start(floor, work / "floor") == 0
    expected = (work / "floor" / "summary.json").read_bytes()
    operations = json.loads((work / "floor.operations").read_text())
    told = []
    for kind in dict.fromkeys(operations):
        out = work / f"killed-{len(told)}"
        killed = start(floor, out, operations.index(kind)) is None
        status = start(floor, out)
        told.append(
            {
                "operation": kind,
                "killed": killed,
                "status": status,
                "equal": status == 0 and (out / "summary.json").read_bytes() == expected,
                "unfinished": [path.name for path in out.rglob(".*")],
            }
        )
    assert start(ours, work / "whole") == start(adapted, work / "adapted") == 0
    return {"twice": [start(ours, work / "twice", after_rows=rows) for rows in TWICE], "operations": told}


def main() -> int:
    sys.modules["matplotlib"] = None  # curves would take longer than all the rest
    if sys.argv[1] == "kill":
        gc.freeze()  # spares the children from looking through what they inherit
        print(json.dumps(kill(Path(sys.argv[2]), *json.loads(sys.argv[3]))))
        return 0
    path = Path(sys.argv[2])
    statuses = []
    for arguments in json.loads(path.read_text()):
        statuses.append(evaluate.main(arguments))
        path.with_name(f"statuses-{PartialState().process_index}.json").write_text(json.dumps(statuses))
        if statuses[-1]:
            return statuses[-1]
    return 0


if __name__ == "__main__":
    sys.exit(main())
