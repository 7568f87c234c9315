"""Run an evaluation from its options to its report, on one process or several that share a folder."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from ..common.beside import Behind, ahead
from ..common.devices import choose_device, on_cpu, own_accelerate_state
from ..common.files import disk_errors, written_whole
from ..common.progress import Progress, Stages
from ..data.datasets import write_shots
from ..data.images import common_depth
from ..method.calibration import check_rate
from . import costs
from . import store as names
from .data import (
    check_data_options,
    check_pictures,
    choose_shots,
    describe_pictures,
    limited,
    load_picture,
    load_truth,
    read_categories,
)
from .detector import Detector, Prediction
from .figures import best_and_worst
from .metrics import check_fpr_limit
from .options import named
from .report import write_report
from .results import write_results
from .store import Draw, Store
from .summary import evaluate_class, resize_map, summarize
from .systems import make_system, needs_new_system

_PATIENCE = timedelta(hours=24)  # a process may have to adapt to a whole data set while the others wait
_WAITING = 2  # pictures read before they are needed, and results that wait to be written
_CASES = 2  # of each kind and category, while there are few
_FEW, _MANY = 4, 8  # categories; of more than a few, the `_MANY` with the lowest image AUROC are shown
_CASE_WORDS = {"found": "clearest defect", "missed": "faintest defect", "false_alarms": "oddest normal part"}


def evaluate(args: argparse.Namespace, report: Callable[[str], None] = lambda sentence: None) -> dict:
    """Runs or completes an evaluation; to be called on every process.

    If a process fails, the others wait for it until the launcher ends them, as those of accelerate and torchrun do.

    Args:
        args: parsed options, see `options.add_arguments`.
        report: called on the main process with a sentence for each finished step.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        ValueError: for unusable options or data, with the names of the options.
    """
    check_options(args)
    state = PartialState(cpu=on_cpu(args.cpu), timeout=_PATIENCE)
    try:
        return _Evaluation(args, state, report).run()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the GPU's memory does not suffice; give a lower `--resolution` or `--mixed_precision` bf16, and the same "
            "other options."
        ) from error


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for options that are wrong whatever the data."""
    check_data_options(args)
    with named():
        check_fpr_limit(args.fpr_limit)
        check_rate(args.false_alarm_rate)
    choose_device(args.device)
    if args.adapt and (args.peer or args.adaptation):
        raise ValueError("`--adapt` fine-tunes AnomalySD to each draw; leave out `--peer` and `--adaptation`.")
    if args.adapt and 0 in args.shots and args.shots_file is None:
        raise ValueError("`--adapt` needs normal pictures, but `--shots` has 0; give 1 or more.")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"`--out` '{args.out}' is a file; give a folder.")


class _Evaluation:
    """Carries the options, the data and the folder through the stages of `evaluate`."""

    def __init__(self, args: argparse.Namespace, state: PartialState, report: Callable[[str], None]):
        self.args, self.state, self.report = args, state, report
        self.store = Store(args.out)
        with state.main_process_first(), self._stage("reading the data set"):
            if state.is_main_process and args.synthetic:
                self.store.claim()  # the parts are drawn into it
            self.root, categories = read_categories(args)
        self.shots = choose_shots(args, self.root, categories)
        self.categories = limited(categories, args.limit)
        self.draws = [Draw(count, seed) for count, by_seed in self.shots.items() for seed in by_seed]
        self.numbers = {name: number for number, name in enumerate(self.categories)}
        self.detector: Detector | None = None
        self.fit_seconds, self.loaded_for = 0.0, None
        self._inspected = 0
        self.depths: dict[str, int | None] = {}

    def run(self) -> dict:
        # 1. Refuse what cannot be evaluated, before anything is written or removed
        self._load(self.draws[0])
        self._check_shots()
        facts = self._facts()
        self.notes = []
        if self.state.is_main_process:
            with self._stage("checking the masks"):
                self.notes = check_pictures(self.categories, self.root, self.args.map_resolution)
        for note in self.notes:
            self.report(note)
        if not self.args.overwrite:
            self.store.check_facts(facts)
        self.state.wait_for_everyone()

        # 2. Begin the folder, or go on in it
        if self.state.is_main_process:
            self.store.claim()
            if self.args.overwrite or not self.store.is_begun():
                self.store.discard()
            with named(path="out"):
                write_shots(self.args.out / names.SHOTS, self.shots, self.root)
            self.store.begin(facts)
        self.state.wait_for_everyone()

        # 3. Evaluate each draw, all processes together
        self._waiting = [draw for draw in self.draws if not self._is_complete(draw)]
        self._began = time.monotonic()
        while self._waiting:
            self._evaluate_draw(self._waiting.pop(0))

        # 4. Summarize and report
        summary = None
        if self.state.is_main_process:
            with self._stage("writing the report"):
                summary = self._summarize(facts)
            self.report(f"Results in {self.args.out / names.REPORT}")
        self.state.wait_for_everyone()
        return summary or self.store.read_json(names.SUMMARY)

    # One draw of normal pictures

    def _is_complete(self, draw: Draw) -> bool:
        return all(self.store.has(self.store.class_path(draw, number)) for number in self.numbers.values())

    def _evaluate_draw(self, draw: Draw) -> None:
        missing = self._missing(draw)
        self.state.wait_for_everyone()  # all processes have read the rows before any adds to them
        jobs = [(name, index) for name, indices in missing.items() for index in indices]
        if jobs:
            self._load(draw)
            self._prepare(draw, [name for name, indices in missing.items() if indices])
            self._inspect(draw, jobs[self.state.process_index :: self.state.num_processes])
            self.store.add_costs(costs.measure(self.state, self.fit_seconds))
            self.state.wait_for_everyone()
        rows = self.store.rows(draw)
        own = list(missing)[self.state.process_index :: self.state.num_processes]
        with self._stage(f"measuring {self._words(draw)}", len(own)) as bar:
            for name in own:
                number = self.numbers[name]
                of_class = [row for key, row in rows.items() if key[2] == number]
                options = (self.args.fpr_limit, self.args.connectivity)
                figures = evaluate_class(self.store, draw, number, self.categories[name], of_class, *options)
                if draw == self.draws[-1]:
                    self._keep_cases(draw, name, of_class)
                self.store.write_json(self.store.class_path(draw, number), figures)
                bar.update()
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            with self._writing():
                self.store.clear(draw, maps=not self.args.keep_maps)
            self.report(f"{self._words(draw)}: {len(self.categories)} categories done")

    def _missing(self, draw: Draw) -> dict[str, list[int]]:
        """Lists the pictures that are not inspected yet, by category without metrics."""
        done = self.store.rows(draw)
        return {
            name: [
                index
                for index in range(len(self.categories[name].test))
                # A map may be missing after a power failure.
                if (draw.shots, draw.seed, number, index) not in done
                or not self.store.map_path(draw, number, index).exists()
            ]
            for name, number in self.numbers.items()
            if not self.store.has(self.store.class_path(draw, number))
        }

    def _load(self, draw: Draw) -> None:
        if self.detector is None or needs_new_system(self.args, self.loaded_for, draw):
            self.detector = None  # frees its memory for the next
            with self.state.local_main_process_first(), self._stage("loading the model"):
                self.detector = make_system(self.args, draw, self.state.device)
            self.loaded_for = draw

    def _pictures(self, name: str, paths: Sequence[Path]) -> list[Image.Image]:
        """Loads pictures of a category, all at one depth."""
        if name not in self.depths:
            self.depths[name] = self.args.bit_depth or common_depth(self.categories[name].train)
        with named(bit_depth="bit_depth"):
            return [load_picture(path, self.depths[name]) for path in paths]

    def _check_shots(self) -> None:
        """Raises ValueError for shots that the loaded detector cannot learn from."""
        for draw in self.draws:
            if draw.shots == 0 and not self.detector.zero_shot:
                raise ValueError(f"`--shots` is 0, but {self.detector.name} needs a normal picture; give 1 or more.")
            if hasattr(self.detector, "check_shots") and not needs_new_system(self.args, self.loaded_for, draw):
                for name in self.categories:
                    self.detector.check_shots(name, draw.shots)

    def _prepare(self, draw: Draw, categories: Sequence[str]) -> None:
        """Learns categories of a draw, each in a single process if its state can be shared."""
        began, detector, drawn = time.perf_counter(), self.detector, self.shots[draw.shots][draw.seed]
        if hasattr(detector, "begin"):
            detector.begin(draw.seed)
        with named():
            if getattr(detector, "adaptation", None) is not None and draw.shots:
                self._adapt(draw)
            elif detector.shareable:
                self._fit_together(draw, categories)
            else:
                with self._learning(draw, len(categories)) as bar:
                    for name in categories:
                        detector.fit(name, self._pictures(name, drawn[name]), draw.seed)
                        bar.update()
        self.fit_seconds = time.perf_counter() - began

    def _adapt(self, draw: Draw) -> None:
        folder = self.store.prepared(draw) / "adaptation"
        if self.state.is_main_process and not folder.exists():
            drawn = self.shots[draw.shots][draw.seed]
            # To all categories, whichever are missing: they share one model.
            normals = {name: self._pictures(name, paths) for name, paths in drawn.items()}
            with own_accelerate_state(one_process=True), Stages(f"learning from {self._words(draw)}") as bar:
                self.detector.adapt(normals, draw.seed, bar.step)
            with self._writing():
                folder.parent.mkdir(parents=True, exist_ok=True)
                self.detector.save_adaptation(folder)
        self.state.wait_for_everyone()
        self.detector.load_adaptation(folder)  # by every process: a saved adaptation is in half precision

    def _fit_together(self, draw: Draw, categories: Sequence[str]) -> None:
        """Learns each category in a single process, unless an interrupted run has learned it."""
        banks, drawn = self.store.prepared(draw) / "banks", self.shots[draw.shots][draw.seed]
        own = categories[self.state.process_index :: self.state.num_processes]
        with self._learning(draw, len(own)) as bar:
            for name in own:
                folder = banks / str(self.numbers[name])
                if not folder.exists():
                    self.detector.fit(name, self._pictures(name, drawn[name]), draw.seed)
                    with self._writing(), written_whole(folder) as partial:
                        self.detector.save(name, partial / "state.safetensors")
                bar.update()
        self.state.wait_for_everyone()
        for name in categories:  # also those just learned, so that all processes inspect with the saved state
            self.detector.load(name, banks / str(self.numbers[name]) / "state.safetensors")

    def _inspect(self, draw: Draw, jobs: Sequence[tuple[str, int]]) -> None:
        paths = ((name, self.categories[name].test[index].path) for name, index in jobs)
        images = (self._pictures(name, [path])[0] for name, path in paths)
        with (
            self._stage(f"inspecting, {self._words(draw)}", len(jobs), "picture") as bar,
            Behind(_WAITING) as later,
            contextlib.closing(ahead(images, _WAITING)) as opened,
        ):
            for (name, index), image in zip(jobs, opened, strict=True):
                bar.say(note=self._left(len(jobs) - bar.n))
                began = time.perf_counter()
                found = self.detector.predict(name, image)
                later(self._keep, draw, name, index, image.size, found, time.perf_counter() - began)
                bar.update()
                self._inspected += 1

    def _keep(
        self, draw: Draw, name: str, index: int, size: tuple[int, int], found: Prediction, seconds: float
    ) -> None:
        test = self.categories[name].test[index]
        row = {
            "shots": draw.shots,
            "seed": draw.seed,
            "category": name,
            "number": self.numbers[name],
            "index": index,
            "image": test.path.relative_to(self.root).as_posix(),
            "defect": test.defect,
            "label": test.label,
            "score": found.score,
            "threshold": found.threshold,
            "seconds": seconds,
        }
        side = self.args.map_resolution
        shape = size[::-1] if side == "original" else (side, side)
        self.store.add(row, resize_map(found.anomaly_map, shape))

    def _keep_cases(self, draw: Draw, name: str, rows: Sequence[Mapping]) -> None:
        """Keeps the maps of the pictures in the report; all others are removed."""
        folder = self.store.folder / names.CASES
        # The color scale without a threshold, the same for all pictures of the category.
        maximum = max(max(row["score"] for row in rows), float(np.finfo(np.float32).tiny))
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            for kind, indices in best_and_worst(rows, _CASES).items():
                for place, index in enumerate(indices):
                    row = rows[index]
                    anomaly_map = np.load(self.store.map_path(draw, row["number"], row["index"]))
                    facts = np.array(json.dumps({"kind": kind, "maximum": maximum, **row}))
                    np.savez(folder / f"{row['number']:04d}-{kind}-{place}.npz", anomaly_map=anomaly_map, facts=facts)

    # Facts and figures

    def _facts(self) -> dict:
        """Collects the facts that two runs of the same evaluation share; JSON-serializable."""
        dataset, protocol = describe_pictures(self.args, self.root, self.categories, self.shots, self.draws)
        system = {"name": self.detector.name, **self.detector.describe()}
        if self.args.peer is None:
            # As given, because `{shots}` and `{seed}` differ between draws.
            given = {"base": self.args.base, "adaptation": self.args.adaptation}
            system |= {key: value for key, value in given.items() if value and (key not in system or "{" in value)}
        protocol |= {
            "resolution": self.args.map_resolution,
            "fpr_limit": self.args.fpr_limit,
            "connectivity": self.args.connectivity,
        }
        protocol |= {} if self.args.bit_depth is None else {"bit_depth": self.args.bit_depth}
        return {"system": system, "dataset": dataset, "protocol": protocol}

    def _summarize(self, facts: Mapping) -> dict:
        """Writes the table of pictures, the summary and the report."""
        found = {
            (draw, name): self.store.read_json(self.store.class_path(draw, number))
            for draw in self.draws
            for name, number in self.numbers.items()
        }
        parts = (facts["system"], facts["dataset"], facts["protocol"])
        summary = summarize(*parts, self.draws, found, list(self.categories))
        rows = list(self.store.rows().values())
        curves = {(draw.shots, draw.seed, name): entry["curves"] for (draw, name), entry in found.items()}
        last = {number: found[self.draws[-1], name]["metrics"]["image_auroc"] for name, number in self.numbers.items()}
        cases = self._cases(sorted(last, key=lambda number: (last[number] is None, last[number] or 0.0, number)))
        with self._writing():
            write_results(self.args.out, rows)
            total = costs.total(self.store.costs(), rows)
            write_report(self.args.out, summary, total, curves, cases, notes=self.notes)
            self.store.write_json(names.SUMMARY, summary)
            for draw in self.draws:
                self.store.clear(draw, maps=False)
            self.store.tidy()
        return summary

    def _cases(self, worst: Sequence[int]) -> list[dict]:
        """Collects the cases for the montage.

        Args:
            worst: numbers of the categories, the lowest image AUROC first.
        """
        cases, shown, count = [], set(self.numbers.values()), _CASES
        if len(self.numbers) > _FEW:
            shown, count = set(worst[:_MANY]), 1
        for path in sorted((self.store.folder / names.CASES).glob("*.npz")):
            number, _, place = path.stem.partition("-")[0], *path.stem.rsplit("-", 1)
            if int(number) not in shown or int(place) >= count:
                continue
            with np.load(path) as archive:
                row, anomaly_map = json.loads(str(archive["facts"])), archive["anomaly_map"]
            test = self.categories[row["category"]].test[row["index"]]
            cases.append(
                {
                    "category": row["category"],
                    "image": self._pictures(row["category"], [test.path])[0],
                    "mask": load_truth(test),
                    "anomaly_map": anomaly_map,
                    "score": row["score"],
                    "threshold": row["threshold"],
                    "label": row["label"],
                    "caption": f"{test.path.name}, {_CASE_WORDS[row['kind']]}",
                    "maximum": row["maximum"],
                }
            )
        return cases

    def _stage(self, title: str, total: int | None = None, unit: str = "category") -> Progress:
        return Progress(title, total, None if total is None else unit, shown=self.state.is_main_process)

    def _learning(self, draw: Draw, categories: int) -> Progress:
        return self._stage(f"learning from {self._words(draw)}", categories)

    def _left(self, pictures: int) -> str:
        """Says how long this and all later draws will take at the pace so far, learning included."""
        if not self._inspected or not self._waiting:
            return ""
        of_a_draw = sum(len(category.test) for category in self.categories.values()) // self.state.num_processes
        seconds = (time.monotonic() - self._began) / self._inspected * (pictures + len(self._waiting) * of_a_draw)
        draws = f"{len(self._waiting)} more draw{'s' * (len(self._waiting) != 1)}"
        return f"{draws}, all done in {timedelta(seconds=round(seconds))}"

    @staticmethod
    def _words(draw: Draw) -> str:
        return f"{draw.shots} shot{'s' * (draw.shots != 1)}, seed {draw.seed}"

    def _writing(self) -> disk_errors:
        return disk_errors("--out", self.args.out, "give the same command to go on")
