"""Learn a part, then inspect any number of pictures, by one process or many."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image

from .. import __version__
from ..common.beside import Behind, ahead
from ..common.console import renamed, renaming
from ..common.devices import choose_device
from ..common.files import SoleWriter
from ..common.progress import Progress
from ..data.depth import KEY
from ..data.picture import Picture
from ..data.region import pack_region
from ..data.sources import Listing, gather, read_normals
from ..method.calibration import check_rate, prediction_threshold
from ..method.prompts import check_category
from ..method.scoring import NotFiniteError
from .folder import ResultFolder
from .result import inspect, load_part, load_pipeline, register, save_part
from .summary import summary

# While one process downloads a base, calibrates or is given larger pictures, the others wait for longer than PyTorch's
# usual limit.
_PATIENCE = timedelta(days=2)
_RATE = 0.05  # of false alarms, where nobody says another
_SETTINGS = ("noise_strength", "feature_weight", "tile_size", "tile_overlap")  # those that have an option


def run(args: argparse.Namespace) -> int:
    """Runs an inspection with parsed options, see `options.add_arguments`; on every process.

    Returns:
        The exit status: 0, or 1 where a picture could be read and has no score.

    Raises:
        ValueError: for input that cannot be used; in one sentence, with the names of the options.
        OSError: for a base that cannot be loaded or a disk that cannot be written.
    """
    with SoleWriter("--out", args.out) as writer:
        return _run(args, writer)


def _run(args: argparse.Namespace, writer: SoleWriter) -> int:
    # 1. Whatever a person may have mistyped, before a model is loaded
    device = choose_device(args.device)
    on_cpu = device.type == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    # Without saying so to accelerate, each of several processes on CPUs would work on its own.
    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    if state.is_main_process and args.out.is_dir():
        writer.keep()
    folder = ResultFolder(args.out, args.overwrite, args.resume, args.maps, state.process_index)
    check_category(args.category)
    check_verdicts(args)
    if args.roi is not None:
        if not args.normal:
            raise ValueError("`--roi` needs `--normal`: a part that was learned before has a region of its own.")
        region_of(args.roi)
    normals, defective = [], []

    def say(sentence: str, option: str) -> None:
        if state.is_main_process:
            _report(renamed(sentence, _names(option)))

    if args.normal and state.is_main_process:
        with renaming(_names("--normal")):
            normals = read_normals(args.normal, lambda told: say(told, "--normal"), args.bit_depth)
        if args.defective:
            depth = args.bit_depth or max((image.info.get(KEY, 0) for image in normals), default=0) or None
            with renaming(_names("--defective")):
                defective = read_normals(args.defective, lambda told: say(told, "--defective"), depth)
    earlier = folder.earlier()
    with renaming(_names("--test")):
        listing = gather(args.test, args.out, earlier.names, lambda told: say(told, "--test"))
    sentences = {number: renamed(sentence, _names("--test")) for number, (_, sentence) in listing.errors.items()}
    for sentence in sentences.values():
        say(sentence, "--test")
    if not listing.sources:
        raise ValueError("`--test` holds no pictures to inspect; give a folder of pictures or picture files.")

    part, parts = args.shard
    if listing.total is not None and part >= listing.total:
        raise ValueError(f"`--shard` {part}/{parts} has no picture, because `--test` has {listing.total}; give fewer.")

    # 2. The model, on the processor that accelerate gives this process
    with state.local_main_process_first():
        device = state.device if state.num_processes > 1 else device
        with Progress("loading the model", shown=state.is_main_process):
            pipe = load_pipeline(args.base, device, args.mixed_precision, resolution=args.resolution)
        if args.adaptation:
            with renaming(_names("--adaptation")):
                pipe.load_adaptation(args.adaptation, overwrite=True)
    if pipe.categories and args.category not in pipe.categories and not args.normal:
        known = ", ".join(map(repr, pipe.categories))
        raise ValueError(
            f"`--category` {args.category!r} is not among the parts that were learned: {known}; give one of these, or "
            "`--normal` pictures of the part."
        )
    options = {"preset": args.preset} | {name: getattr(args, name) for name in _SETTINGS}
    with renaming({name: f"--{name.replace('_', '-')}" for name in _SETTINGS}):
        pipe.settings(category=args.category, **options)  # a wrong option is no picture's fault
    threshold = args.threshold
    if args.false_alarm_rate is not None and not args.normal:
        threshold = threshold_at(pipe, args.category, args.false_alarm_rate)
    state.wait_for_everyone()  # nobody writes before everybody has looked at the folder

    # 3. The part, learned by one process, so that all compare with the same prototypes and threshold
    if state.is_main_process:
        writer.keep()
        folder.begin(describe(args, pipe, normals, defective), given(args))
        if args.normal and not folder.part.exists():
            named = {"normal_images": "--normal", "defective_images": "--defective", "region": "--roi"}
            with renaming(named), Progress(f"learning {args.category}", len(normals), "picture") as bar:
                rate = args.false_alarm_rate or _RATE
                register(pipe, args.category, normals, args.seed, rate, defective, args.roi, bar.at, **options)
            folder.keep_part(lambda path: save_part(pipe, args.category, path))
    state.wait_for_everyone()
    if args.normal:
        load_part(pipe, args.category, folder.part)

    # 4. This process's pictures
    if threshold is not None:
        options["threshold"] = threshold
    try:
        with (
            renaming(_names("--test")),
            _progress(state, listing, parts, len(earlier.names)) as bar,
            Behind(_waiting(_at_once(pipe))) as later,
        ):
            pictures = listing.deal(
                state.process_index,
                state.num_processes,
                part,
                parts,
                done=lambda picture: picture.file in earlier.names,
                read=lambda source, shard: (source, shard) in earlier.shards,
                at_end=functools.partial(later, folder.end),
            )
            inspect_pictures(
                pipe, pictures, folder, args.category, args.seed, options, bar, args.bit_depth, later=later
            )
        state.wait_for_everyone()
    finally:  # an interrupted run keeps what it has found
        folder.close()
        counts = folder.finish(listing, sentences) if state.is_main_process else None

    # 5. What the table of all processes says
    if state.is_main_process:
        if counts is None or not counts.inspected + counts.unscored:
            raise ValueError("`--test` holds no picture that can be read; see the sentences above.")
        calibration = pipe.config.categories.get(args.category, {}).get("calibration") or {}
        if threshold is None and calibration.get("expected_misses") is not None:
            print(
                f"Threshold {calibration['threshold']:.6g}: of good parts {calibration['expected_false_alarms']:.1%} "
                f"are expected above it, of defective ones {calibration['expected_misses']:.1%} below it"
            )
        print(summary(folder, counts))
        return 1 if counts.unscored else 0
    return 0


def inspect_pictures(
    pipe,
    pictures: Iterable[Picture],
    folder: ResultFolder,
    category: str,
    seed: int = 0,
    options: Mapping[str, object] | None = None,
    bar: Progress | None = None,
    bit_depth: int | None = None,
    at_once: int | None = None,
    later: Callable | None = None,
) -> None:
    """Inspects pictures into a folder, several together; those that cannot be read, or have no finite score, are
    reported and noted. Files are read ahead, in a thread.

    Args:
        pipe: an `AnomalySDPipeline`.
        pictures: see `sources.Listing.deal`.
        folder: begun by one process.
        category, seed, options: see `result.inspect`.
        bar: goes on by one for each picture.
        bit_depth: see `load_image`; None: that of the category.
        at_once: pictures inspected together; None: 16 on a GPU, whose batches of passes then span pictures, and 1 on a
            CPU, which gains nothing by it.
        later: called as `later(function, *arguments)` to have a result written, see `Behind`; None: at once.
    """
    bar = Progress("inspecting", shown=False) if bar is None else bar
    bit_depth = bit_depth or pipe.config.categories.get(category, {}).get("bit_depth")
    at_once = at_once or _at_once(pipe)
    later = later or (lambda function, *arguments: function(*arguments))
    waiting: list[tuple[Picture, Image.Image]] = []

    def read() -> Iterator[tuple[Picture, Image.Image | ValueError]]:
        for picture in pictures:
            try:
                loaded = picture.load(bit_depth)
            except ValueError as error:
                loaded = error
            yield picture, loaded

    def leave_out(picture: Picture, error: ValueError, read: bool) -> None:
        sentence = renamed(error, _names("--test") | {"mixed_precision": "--mixed-precision"})
        later(folder.fail, picture, sentence, read)
        with bar.external_write_mode(file=sys.stderr):
            _report(sentence)
        bar.update()

    def inspect_together(pairs: Sequence[tuple[Picture, Image.Image]]) -> None:
        try:
            found = inspect(pipe, [image for _, image in pairs], category, seed, **(options or {}))
        except NotFiniteError as error:
            if len(pairs) == 1:
                leave_out(pairs[0][0], NotFiniteError(f"`source` '{pairs[0][0].file}'", error.stage), read=True)
            else:  # one of them spoils the others' results
                for pair in pairs:
                    inspect_together([pair])
            return
        for (picture, _), result in zip(pairs, found, strict=True):
            later(folder.add, picture, result)
            bar.update()

    with contextlib.closing(ahead(read(), _waiting(at_once))) as opened:
        for picture, loaded in opened:
            if isinstance(loaded, ValueError):
                leave_out(picture, loaded, read=False)
            else:
                waiting.append((picture, loaded))
            if len(waiting) == at_once:
                inspect_together(waiting)
                waiting.clear()
    if waiting:
        inspect_together(waiting)


def _at_once(pipe) -> int:
    """Counts the pictures that are inspected together: on a GPU as many as a batch has passes, so that batches are
    full however many passes a picture takes."""
    return 16 if pipe.device.type == "cuda" else 1


def _waiting(at_once: int) -> int:
    """Counts the pictures that may be read ahead, and the results that may wait to be written: as many as are
    inspected together, so that nobody waits for them; two at least."""
    return max(2, at_once)


def check_verdicts(args: argparse.Namespace) -> None:
    """Raises ValueError for options about the threshold that do not go together."""
    if args.false_alarm_rate is not None:
        with renaming({"false_alarm_rate": "--false-alarm-rate"}):
            check_rate(args.false_alarm_rate)
    if args.defective and (not args.normal or args.threshold is not None):
        raise ValueError("`--defective` needs `--normal` and no `--threshold`: together they set the threshold.")


def region_of(path: str) -> str:
    """Reads the mask picture of `--roi`. Raises ValueError if it cannot be used."""
    with renaming({"mask": "--roi"}):
        return pack_region(path)


def threshold_at(pipe, category: str, false_alarm_rate: float) -> float:
    """Computes the threshold of a calibrated part at another rate from its stored scores.

    Raises:
        ValueError: the part is not calibrated, or by a guess from one picture.
    """
    calibration = pipe.config.categories.get(category, {}).get("calibration")
    if calibration is None or not calibration["held_out"]:
        raise ValueError(
            "`--false-alarm-rate` needs `--normal`, or an `--adaptation` calibrated from two or more pictures."
        )
    return prediction_threshold(calibration["scores"], false_alarm_rate)


def describe(
    args: argparse.Namespace, pipe, normals: Sequence[Image.Image], defective: Sequence[Image.Image] = ()
) -> dict[str, object]:
    """Maps each option to what it contributes to a result; runs with equal descriptions give equal results."""
    preset = args.preset or pipe.config.default_preset
    settings = pipe.settings(args.preset, args.category, **{name: getattr(args, name) for name in _SETTINGS})
    named = {f"--{name.replace('_', '-')}" if name in _SETTINGS else name: v for name, v in settings.to_dict().items()}
    named |= {name: named[name] or None for name in ("--tile-size", "--tile-overlap")}  # earlier runs have none
    return {
        "--category": args.category,
        "--bit-depth": args.bit_depth,
        "--base": _digest(pipe.adaptation_base()),
        "--resolution": pipe.config.resolution,
        "--adaptation": _digest(*_knowledge(pipe, args.category)),
        "--normal": _digest(*normals) if normals else None,
        "--defective": _digest(*defective) if defective else None,
        "--roi": None if args.roi is None else _digest(region_of(args.roi)),
        "--threshold": args.threshold,
        "--false-alarm-rate": None if args.false_alarm_rate == _RATE else args.false_alarm_rate,
        "--preset": preset,
        "--mixed-precision": pipe.mixed_precision,
        **named,
        "--seed": args.seed,
        "--maps": "on" if args.maps else "off",
    }


def given(args: argparse.Namespace) -> dict[str, object]:
    """Notes what a person gave, for a reader of `run.json`."""
    names = ("base", "adaptation", "normal", "defective", "test")
    return {"version": __version__, **{name: getattr(args, name) for name in names}}


def _knowledge(pipe, category: str) -> list:
    """Lists what a pipeline knows of a category before it is shown normal pictures."""
    record = pipe.config.categories.get(category)
    known = [record, pipe.prompt_book.to_dict()["categories"].get(category)]
    if category in pipe.bank:
        known.append(pipe.bank[category])
    if record is not None and record.get("adaptation"):
        for part, own in sorted(pipe.adapters.state(record["adaptation"]).items()):
            known += [item for name, value in sorted(own.items()) for item in (f"{part}.{name}", value)]
    return known


def _digest(*values: object) -> str:
    """Computes a short mark of pictures, tensors and whatever JSON can hold."""
    mark = hashlib.sha256()
    for value in values:
        if isinstance(value, Image.Image):
            mark.update(f"{value.size}".encode() + value.tobytes())
        elif isinstance(value, torch.Tensor):
            mark.update(f"{list(value.shape)}".encode() + value.detach().float().cpu().numpy().tobytes())
        else:
            mark.update(json.dumps(value, sort_keys=True).encode())
    return mark.hexdigest()[:16]


def _progress(state: PartialState, listing: Listing, parts: int, done: int) -> Progress:
    """Makes a bar over the pictures of this process, shown by the first."""
    share = None if listing.total is None else -(-max(0, -(-listing.total // parts) - done) // state.num_processes)
    return Progress("inspecting", share, "picture", shown=state.is_main_process)


def _names(option: str) -> dict[str, str]:
    """Maps the arguments that an option stands for to it."""
    return {**dict.fromkeys(("source", "pretrained_adaptation_name_or_path"), option), "bit_depth": "--bit-depth"}


def _report(sentence: str) -> None:
    print(f"anomalysd: {' '.join(sentence.split())}", file=sys.stderr)
