"""Write the results of any number of pictures into a folder, as they come, by one process or many.

| in the folder | |
|---|---|
| `results.csv`, `results.json` | the table, and the same in anomalib's words; written at the end |
| `coco.json`, `montage.png` | boxes of the defects, and the highest scores in pictures; written at the end |
| `heatmaps/`, `masks/`, `maps/` | of each picture; masks and boxes only where there is a threshold |
| `run.json` | what all results in the folder rest on |
| `part.safetensors` | what was learned from the normal pictures, see `inspection.save_part` |
| `rows/` | a line for each picture, in a file of each process: what an interrupted run goes on from |

A row is written after the picture's own files, and each of those is complete or not there. So a picture with a row
needs nothing more, and one without, or with a damaged one, is done again.
"""

from __future__ import annotations

import heapq
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..common.drawing import montage
from ..common.files import disk_errors, remove, write_names, write_whole
from ..data.listing import RESULTS
from ..data.picture import Picture
from ..data.sources import Listing
from .annotations import find_boxes, prediction, write_coco, write_list
from .result import Inspection, caption, write_table
from .rows import Entry, cells, place_of, read_again, read_all

MONTAGE_ROWS = 24
RESULT_COLUMNS = ("file", "score", "threshold", "verdict", "seconds", "error")
PART = "part.safetensors"
ROWS, PICTURES = "rows", ("heatmaps", "masks", "maps")
_TABLE, _FACTS, _MONTAGE = "results.csv", RESULTS, "montage.png"
_LIST, _COCO = "results.json", "coco.json"
_CELL = 176  # pixels, the side of a picture in the montage


@dataclass(frozen=True)
class Counts:
    """Counts the pictures of a table by outcome, and tells whether there are verdicts.

    Attributes:
        failed: those that could not be read.
        unscored: those that could be read, and have no score all the same.
        threshold: of the highest score; None where there is none.
        worst: file and score of at most `MONTAGE_ROWS` defective ones, the highest score first.
    """

    inspected: int
    defective: int
    failed: int
    unscored: int
    verdicts: bool
    threshold: float | None = None
    worst: tuple[tuple[str, float], ...] = ()


class ResultFolder:
    """Holds a folder of results; memory does not grow with the number of pictures while they come.

    Every process has an object of its own. `begin` and `finish` are for one of them, and `finish` may be called after
    a part of the pictures too.

    Args:
        folder: made if missing, by `begin`.
        overwrite: whether the results of an earlier run are replaced. Files of other names stay.
        resume: whether an earlier run is gone on with, if there is one.
        maps: whether every anomaly map is saved as `maps/<name>.npy`, float32 [H, W].
        rank: number of this process.

    Raises:
        ValueError: `folder` is a file, or holds results and neither `overwrite` nor `resume` is given.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        overwrite: bool = False,
        resume: bool = False,
        maps: bool = False,
        rank: int = 0,
    ):
        self.folder, self.resume = Path(folder), resume
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"`--out` '{folder}' is a file; give a folder.")
        results = (self.folder / _TABLE).exists() or any((self.folder / ROWS).glob("*.jsonl"))
        earlier = results or (self.folder / _FACTS).exists()
        if earlier and not (overwrite or resume):
            raise ValueError(
                f"`--out` '{folder}' already holds results; give another folder, --resume to go on with them, or "
                "--overwrite to start anew."
            )
        if results and resume and not (self.folder / _FACTS).is_file():
            raise ValueError(
                f"`--out` '{folder}' holds results without a {_FACTS}, so nobody knows what they rest on; give "
                "another folder, or --overwrite to start anew."
            )
        self._maps = maps
        # Unlike every other one, of this run and of earlier ones.
        self._id = f"{rank}-{uuid.uuid4().hex[:12]}"
        self._file = None
        self._shown: list[tuple[float, int, str]] = []
        self._added = 0

    @property
    def part(self) -> Path:
        """Names the file for what was learned from normal pictures."""
        return self.folder / PART

    def begin(self, facts: Mapping[str, object], given: Mapping[str, object]) -> None:
        """Makes the folder ready, by one process before any result.

        Args:
            facts: option to what a result depends on; JSON-serializable.
            given: what else a person may want to know of the run.

        Raises:
            ValueError: an earlier run, with which this one is to go on, had other `facts`.
        """
        ours = json.loads(json.dumps(dict(facts)))
        if self.resume and (self.folder / _FACTS).exists():
            self._compare(ours)
        else:
            # Last what the others are worth nothing without: killed in between, the folder never lies.
            with self._disk_errors():
                remove(self.folder / ROWS)
                self.part.unlink(missing_ok=True)
            text = json.dumps({"facts": ours, "given": dict(given)}, indent=2, ensure_ascii=False) + "\n"
            self._write(self.folder / _FACTS, lambda path: write_names(path, text))
        for leftover in (self.folder / ROWS).glob(".*.partial"):  # of a process that was killed while writing
            leftover.unlink(missing_ok=True)

    def keep_part(self, save: Callable[[Path], object]) -> None:
        """Writes what was learned from normal pictures; `save` is called with the path of a file."""
        self._write(self.part, save)

    def _compare(self, ours: Mapping[str, object]) -> None:
        theirs = read_facts("--out", self.folder, ", or --overwrite to start anew")["facts"]
        for option, value in ours.items():
            if theirs.get(option) != value:
                raise ValueError(
                    f"`{option}` gives {_shown(value)}, but the results in '{self.folder}' rest on "
                    f"{_shown(theirs.get(option))}; give the same as before, another `--out`, or --overwrite to start "
                    "anew."
                )

    def earlier(self) -> Earlier:
        """Reads what earlier runs have done; asked by every process before any of them goes on."""
        done: dict[str, str] = {}
        counts: Counter[tuple[str, int]] = Counter()
        lengths: dict[tuple[str, int], int] = {}
        for _, _, row in read_all(self.folder / ROWS) if self.resume else ():
            shard = row.get("source"), row.get("shard")
            if "pictures" in row:
                lengths[shard] = row["pictures"]
            elif "error" not in row and row["file"] not in done:
                done[row["file"]] = row["name"]
                counts[shard] += 1
        return Earlier(done, {shard for shard, length in lengths.items() if counts[shard] == length})

    def add(self, picture: Picture, result: Inspection) -> None:
        """Keeps the result of a picture."""
        heat = result.overlay()
        # A third of the usual level's time, which is most of what a large picture takes, for a seventh more bytes.
        quick = {"format": "PNG", "compress_level": 1}
        self._write(self.folder / "heatmaps" / f"{picture.name}.png", lambda path: heat.save(path, **quick))
        if self._maps:
            self._write(self.folder / "maps" / f"{picture.name}.npy", lambda path: _save_map(path, result.anomaly_map))
        row = {"score": result.score, "threshold": result.threshold, "seconds": round(result.seconds, 2)}
        row |= {"width": result.image.width, "height": result.image.height, "boxes": []}
        if (mask := result.predicted) is not None:
            white = Image.fromarray(np.uint8(255) * mask)
            self._write(self.folder / "masks" / f"{picture.name}.png", lambda path: white.save(path, "PNG"))
            row["boxes"] = find_boxes(mask, result.anomaly_map)
        self._added += 1
        shown = f"{self._id}-{self._added}.png"
        dropped = None
        if len(self._shown) < MONTAGE_ROWS:
            heapq.heappush(self._shown, (result.score, -self._added, shown))
        else:
            dropped = heapq.heappushpop(self._shown, (result.score, -self._added, shown))[2]
        if dropped != shown:
            strip = _strip([_thumbnail(image) for image in (result.image, result.inpainted, heat)])
            self._write(self.folder / ROWS / shown, lambda path: strip.save(path, "PNG"))
            row["shown"] = shown
        self._append({**place_of(picture), "name": picture.name, **row})
        if dropped is not None and dropped != shown:
            (self.folder / ROWS / dropped).unlink(missing_ok=True)

    def fail(self, picture: Picture, sentence: str, read: bool = False) -> None:
        """Keeps the reason why a picture was not inspected; a run that goes on tries it again.

        Args:
            read: whether the picture could be read, and has no score all the same.
        """
        self._append({**place_of(picture), "error": " ".join(sentence.split()), "read": read})

    def end(self, source: str, shard: int, pictures: int) -> None:
        """Keeps how many pictures a shard has, so that a run that goes on need not read it to its end again."""
        self._append({"source": source, "shard": shard, "pictures": pictures})

    def finish(self, listing: Listing, sentences: Mapping[int, str] | None = None) -> Counts | None:
        """Writes the tables in the order of the listing, and the montage of the `MONTAGE_ROWS` highest scores, highest
        first; from the rows of all processes and runs. Nothing, and None, if there is no row.

        Args:
            listing: what was to be inspected; rows of other pictures are left out.
            sentences: number of a source without pictures to the reason.
        """
        index = self._index(listing)
        sentences = sentences or {}
        if not index and not sentences:
            return None
        missing = [
            ((number, -1, -1), {"file": listing.errors[number][0], "error": s}) for number, s in sentences.items()
        ]
        verdicts = any(entry.defective is not None for entry in index)

        def rows() -> Iterator[dict]:
            return (row for _, row in heapq.merge(missing, read_again(index), key=lambda entry: entry[0]))

        with self._disk_errors():
            write_table(self.folder / _TABLE, map(cells, rows()), RESULT_COLUMNS)
            if not verdicts:
                (self.folder / _COCO).unlink(missing_ok=True)  # of an earlier run with a threshold
        self._write(self.folder / _LIST, lambda path: write_list(path, map(prediction, rows())))
        if verdicts:
            self._write(self.folder / _COCO, lambda path: write_coco(path, rows))
        # Of equal scores those listed first, because the sort is stable.
        best = heapq.nlargest(MONTAGE_ROWS, (entry for entry in index if entry.score is not None), lambda e: e.score)
        highest = [row for _, row in read_again(best)]
        if best:
            figure = montage(
                [self._thumbnails(row) for row in highest],
                ["input", "repainted", "heatmap"],
                [caption(row["name"], row["score"], row["threshold"]) for row in highest],
                cell=_CELL,
            )
            self._write(self.folder / _MONTAGE, lambda path: figure.save(path, "PNG"))
        defective = sum(entry.defective is True for entry in index)
        inspected = sum(entry.score is not None for entry in index)
        unscored = sum(entry.read for entry in index if entry.score is None)
        failed = len(index) - inspected - unscored + len(missing)
        threshold = highest[0]["threshold"] if highest else None
        worst = tuple((row["file"], row["score"]) for row in highest[:defective])
        return Counts(inspected, defective, failed, unscored, verdicts, threshold, worst)

    def close(self) -> None:
        """Closes this process's file of rows."""
        if self._file is not None:
            file, self._file = self._file, None
            with self._disk_errors():
                file.close()

    def _index(self, listing: Listing) -> list[Entry]:
        """Finds each picture's row, in the order of the listing; of several that with a result, or the last."""
        place = listing.places()
        found: dict[tuple[int, int, int], Entry] = {}
        for path, offset, row in read_all(self.folder / ROWS):
            at = None if "pictures" in row else place(row)
            if at is None or ("error" in row and at in found):
                continue
            score, threshold = row.get("score"), row.get("threshold")
            defective = None if score is None or threshold is None else score > threshold
            found[at] = Entry(at, path, offset, score, defective, row.get("read", False))
        return [found[at] for at in sorted(found)]

    def _thumbnails(self, row: Mapping) -> list[Image.Image | None]:
        strip = self.folder / ROWS / row.get("shown", "")
        if strip.is_file():
            with Image.open(strip) as image:
                width = image.width // 3
                return [image.crop((i * width, 0, (i + 1) * width, image.height)) for i in range(3)]
        # A picture that higher scores had crowded out, and that are not in the listing any more.
        with Image.open(self.folder / "heatmaps" / f"{row['name']}.png") as image:
            return [None, None, _thumbnail(image)]

    def _append(self, row: Mapping[str, object]) -> None:
        with self._disk_errors():
            if self._file is None:
                path = self.folder / ROWS / f"{self._id}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def _write(self, path: Path, save: Callable[[Path], object]) -> None:
        """Writes a file that is complete or not there."""
        partial = self.folder / ROWS / f".{self._id}.partial"
        with self._disk_errors():
            partial.parent.mkdir(parents=True, exist_ok=True)
            # Three files of each picture: waiting for the disk would take longer than an inspection on a GPU.
            write_whole(path, save, partial, flushed=False)

    def _disk_errors(self) -> disk_errors:
        return disk_errors("--out", self.folder, "give the same command with --resume to go on")


def read_facts(argument: str, folder: Path, remedy: str = "") -> dict[str, dict]:
    """Reads what the results in a folder rest on, "facts", and what a person gave, "given".

    Raises:
        ValueError: the folder holds none that can be read; the sentence names the argument.
    """
    if not (folder / _FACTS).is_file():
        raise ValueError(f"`{argument}` '{folder}' holds no results of an inspection; give a folder with a {_FACTS}.")
    try:
        found = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        return {"facts": dict(found["facts"]), "given": dict(found["given"])}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"`{argument}` '{folder}' holds a {_FACTS} that cannot be read; give another folder{remedy}."
        ) from error


@dataclass(frozen=True)
class Earlier:
    """Tells what earlier runs have done.

    Attributes:
        names: file to the name of its outputs.
        shards: source and number of each shard of which every picture is done.
    """

    names: Mapping[str, str]
    shards: set[tuple[str, int]]


def _shown(value: object) -> str:
    return "nothing" if value is None else f"'{value}'"


def _save_map(path: Path, anomaly_map: np.ndarray) -> None:
    with open(path, "wb") as file:  # given a path, NumPy would add a suffix
        np.save(file, anomaly_map)


def _thumbnail(image: Image.Image) -> Image.Image:
    """Makes a copy that fits a montage's cell."""
    ratio = min(1.0, _CELL / max(image.size))
    return image.resize([max(1, round(length * ratio)) for length in image.size], Image.Resampling.LANCZOS)


def _strip(images: list[Image.Image]) -> Image.Image:
    """Puts pictures of one size side by side."""
    strip = Image.new("RGB", (len(images) * images[0].width, images[0].height))
    for index, image in enumerate(images):
        strip.paste(image, (index * image.width, 0))
    return strip
