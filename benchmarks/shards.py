"""A folder of many pictures inspected as by two machines, of which one is killed and goes on, then merged.

    python benchmarks/shards.py [--pictures 20000] [--base DIR|ID] [--out DIR]

Draws small pictures and starts `anomalysd detect --shard 0/2` and `--shard 1/2`, each into a folder of its own. The
second gets SIGKILL when it has half of its pictures, and is started again with `--resume`. Reads the resident memory
of both every second, merges the folders by `anomalysd merge`, and counts: pictures begun and not kept when the kill
came, rows of each picture, and a least-squares line through the memory of the second half. Without `--base`, a tiny
checkpoint with random weights is used, which needs the sources' `tests`. Exits with 1 if a picture is missing or there
twice.
"""

import argparse
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' helpers are no installed package


def prepare(work: Path, count: int, base: str | None) -> list[str]:
    """Draws pictures of 64 px, learns the part from two, and gives the arguments of `anomalysd detect`."""
    from anomalysd_pipeline.inspection.result import load_pipeline, register, save_part
    from anomalysd_pipeline.synthetic import normal_images
    from benchmarks.detect import draw

    pictures, part = work / "pictures", work / "part.safetensors"
    pictures.mkdir(parents=True)
    draw(pictures, count, 64)
    if base is None:
        from tests.conftest import make_tiny_pipeline

        base = str(work / "base")
        quick = {"fast": {"num_inference_steps": 1, "noise_strength": 1.0, "mask_scales": [1], "start": "image"}}
        make_tiny_pipeline(preset_overrides=quick, resolution=32).save_pretrained(base)
    pipe = load_pipeline(base, "cpu", "no")
    register(pipe, "hex nut", normal_images("hex_nut", 2, seed=1, size=64), preset="fast")
    save_part(pipe, "hex nut", part)  # learned once: every machine compares with the same bits
    given = ["--adaptation", str(part), "--test", str(pictures), "--category", "hex nut", "--base", base]
    return [*given, "--preset", "fast", "--device", "cpu"]


def start(command: list[str], log: Path) -> subprocess.Popen:
    """Starts `anomalysd`, with what it says in a file."""
    with open(log, "ab") as file:
        return subprocess.Popen([sys.executable, "-m", "anomalysd_pipeline", *command], stdout=file, stderr=file)


def rows(out: Path) -> list[dict]:
    """Reads the complete rows of a folder of results."""
    lines = [line for path in out.glob("rows/*.jsonl") for line in path.read_bytes().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def count_rows(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("rows/*.jsonl"))


def watch(runs: dict[str, subprocess.Popen], until, curves: dict[str, list]) -> None:
    """Notes the seconds and MiB of each run, until all have ended or a function says so."""
    import psutil

    due = 0.0
    while any(run.poll() is None for run in runs.values()) and not until():
        if time.time() >= due:
            for name, run in runs.items():
                memory = 0
                with contextlib.suppress(psutil.Error):  # it may just have ended
                    memory = psutil.Process(run.pid).memory_info().rss / 2**20
                if memory:
                    curves.setdefault(name, []).append((time.time(), memory))
            due = time.time() + (1 if len(curves.get(name, ())) > 60 else 0.1)
        time.sleep(0.01)  # small pictures take few hundredths of a second, and the kill has to come between two


def try_out(work: Path, count: int, base: str | None) -> dict:
    """Runs the trial in a folder; returns what it found."""
    given = prepare(work, count, base)
    outs = [work / "out-0", work / "out-1"]
    commands = [["detect", *given, "--shard", f"{i}/2", "--out", str(out)] for i, out in enumerate(outs)]
    runs = {f"machine {i}": start(command, work / f"log-{i}") for i, command in enumerate(commands)}
    curves: dict[str, list] = {}
    began = time.time()
    try:
        watch(runs, lambda: count_rows(outs[1]) >= count // 4, curves)
        runs["machine 1"].send_signal(signal.SIGKILL)
        killed = runs["machine 1"].wait() == -signal.SIGKILL
        kept = {row["name"] for row in rows(outs[1])}
        begun = {path.stem for path in outs[1].glob("heatmaps/*.png")}
        del runs["machine 1"]
        runs["machine 1, resumed"] = start([*commands[1], "--resume"], work / "log-1")
        watch(runs, lambda: False, curves)
    finally:
        for run in runs.values():
            run.kill()
    status = [run.wait() for run in runs.values()]
    seconds = time.time() - began
    merged = start(["merge", *map(str, outs), "--out", str(work / "all")], work / "log-merge")
    merging = time.time()
    watch({"merging": merged}, lambda: False, curves)
    merging = time.time() - merging
    status.append(merged.wait())
    if any(status):
        raise SystemExit(f"a run failed: {[(work / f'log-{name}').read_text()[-2000:] for name in (0, 1, 'merge')]}")
    with open(work / "all" / "results.csv", newline="", encoding="utf-8") as file:
        table = [row["file"] for row in csv.DictReader(file)]
    written = Counter(row["file"] for out in outs for row in rows(out))
    return {
        "killed": killed,
        "kept": len(kept),
        "lost": len(begun - kept),
        "missing": count - len(set(table)),
        "in order": table == sorted(table),
        "twice": len(table) - len(set(table)) + sum(times > 1 for times in written.values()),
        "seconds": seconds,
        "merging": merging,
        "curves": curves,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--base", help="default: a tiny checkpoint with random weights")
    parser.add_argument("--out", type=Path, help="folder for all files, kept (default: a temporary one)")
    arguments = parser.parse_args()

    import numpy as np

    with tempfile.TemporaryDirectory() as temporary:
        found = try_out(arguments.out or Path(temporary, "work"), arguments.pictures, arguments.base)
    each = 2 * found["seconds"] / arguments.pictures
    print(f"{arguments.pictures} pictures by two processes in {found['seconds']:.0f} s, {each:.3f} s each")
    print(f"merged in {found['merging']:.1f} s; {os.cpu_count()} processors")
    for name, curve in found["curves"].items():
        half = np.array(curve[len(curve) // 2 :])
        rise = np.polyfit(half[:, 0] - half[0, 0], half[:, 1], 1)[0] * 60 if len(half) > 1 else 0.0
        ends = f"{curve[len(curve) // 2][1]:.1f} MiB half way, {curve[-1][1]:.1f} at the end"
        slope = f"; {rise:+.3f} MiB a minute" if curve[-1][0] - curve[0][0] > 120 else ""  # else all beginning
        print(f"{name:>20}: {ends}, highest {max(curve, key=lambda at: at[1])[1]:.1f}{slope}")
    print(f"killed with {found['kept']} rows: {found['lost']} pictures begun and lost")
    print(f"rows that are missing: {found['missing']}, twice: {found['twice']}; in order: {found['in order']}")
    if found["missing"] or found["twice"] or not found["killed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
