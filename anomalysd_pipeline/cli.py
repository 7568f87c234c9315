"""Offer the commands `anomalysd demo | app | detect | merge | adapt | evaluate | publish | export | synth`.

Modules that need torch are imported when a command runs, so that `--help` and mistyped options are answered at once.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from . import __version__
from .common.console import OptionParser, positive, renaming, run_command
from .common.files import disk_errors, write_whole
from .common.progress import Progress
from .evaluation import options as evaluation_options
from .inspection import options as detect_options
from .training import options as train_options

STARTING = "starting"  # importing PyTorch takes seconds
DEMO_FAMILIES = "hex_nut,wood,washer"
DEMO_SHOTS = 4
DEMO_PICTURES = 4  # of good parts, and as many of defective ones
DEMO_LINE = "{:<18}{:>12}{:>13}{:>14}{:>10}{:>11}"
DEMO_COLUMNS = ("family", "index", "defect", "label", "score", "threshold", "verdict", "seconds")


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit status: 0 on success, 2 for input that cannot be used (one sentence on stderr), 130 if interrupted.

    Raises:
        SystemExit: by argparse, with 0 for `--help` and 2 for arguments it cannot parse.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.run is None:
        parser.print_help()
        return 0
    return run_command(args.run, args)


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="anomalysd", description="Find defects on industrial parts from zero to a handful of normal pictures."
    )
    parser.add_argument("--version", action="version", version=f"anomalysd {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    demo = commands.add_parser("demo", help="learn and inspect drawn parts, with pictures and a table of the outcome")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results (default: demo)")
    demo.add_argument("--families", type=_names, default=DEMO_FAMILIES, metavar="A,B", help="default: %(default)s")
    detect_options.add_model_options(demo)
    demo.set_defaults(run=_demo)

    app = commands.add_parser(
        "app",
        help="start the app in the browser",
        description="Start the app; needs `pip install 'anomalysd-pipeline[app]'`. Bounds and the model are set by "
        "environment variables, see docs/app.md.",
    )
    app.add_argument("--host", metavar="ADDRESS", help="address to serve at (default: this machine alone)")
    app.add_argument("--port", type=positive, metavar="N", help="default: the first free one from 7860 on")
    app.set_defaults(run=_app)

    detect = commands.add_parser(
        "detect",
        help="inspect your own pictures",
        description="Inspect any number of pictures, on one processor. For several, `accelerate launch -m "
        "anomalysd_pipeline.detect` takes the same options.",
    )
    detect_options.add_arguments(detect)
    detect.set_defaults(run=_detect)

    merge = commands.add_parser(
        "merge",
        help="put the results of several machines together",
        description="Merge folders that `anomalysd detect --shard I/N` wrote; needs neither the pictures nor a model.",
    )
    merge.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders of results")
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for all of them")
    merge.add_argument("--overwrite", action="store_true", help="replace the results in --out")
    merge.set_defaults(run=_merge)

    adapt = commands.add_parser(
        "adapt",
        help="learn your own parts from a few normal pictures",
        description="Fine-tune on a few normal pictures, on one processor. For several, `accelerate launch -m "
        "anomalysd_pipeline.train` takes the same options.",
    )
    train_options.add_arguments(adapt, report_to="none")
    adapt.set_defaults(run=_adapt)

    evaluate = commands.add_parser(
        "evaluate",
        help="figures for a data set with labels",
        description="Evaluate on a data set with labels, on one processor. For several, `accelerate launch -m "
        "anomalysd_pipeline.evaluate` takes the same options.",
    )
    evaluation_options.add_arguments(evaluate)
    evaluate.set_defaults(run=_evaluate)

    publish = commands.add_parser(
        "publish",
        help="upload a pipeline or an adaptation to the Hugging Face Hub",
        description="Upload a folder. Log in with `hf auth login`, or set HF_TOKEN.",
    )
    publish.add_argument("folder", type=Path, metavar="DIR", help="a saved pipeline or adaptation")
    publish.add_argument("repo_id", metavar="USER/NAME", help="repository, made if missing")
    publish.add_argument("--private", action="store_true", help="a new repository is private")
    publish.add_argument("--create-pr", action="store_true", help="propose the upload as a pull request")
    publish.add_argument(
        "--without-exemplars",
        action="store_true",
        help="leave out the normal pictures that parts were registered with",
    )
    publish.set_defaults(run=_publish)

    export = commands.add_parser(
        "export",
        help="write a part as an ONNX model that needs no Stable Diffusion",
        description="Write the prototype distance of a part, with a threshold of its own, as one ONNX model; needs "
        "`pip install 'anomalysd-pipeline[onnx]'`, see docs/detecting.md.",
    )
    export.add_argument("part", metavar="PART", help="what was learned: folder, file or Hub id")
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="the model, such as nut.onnx")
    export.add_argument("--category", metavar="NAME", help="default: the only one in PART")
    export.add_argument(
        "--size",
        nargs=2,
        type=positive,
        metavar=("H", "W"),
        help="height and width of the camera's pictures (default: those at which normal pictures were described)",
    )
    export.add_argument(
        "--false-alarm-rate",
        type=float,
        default=0.05,
        metavar="P",
        help="share of good parts that may be called defective (default: %(default)s)",
    )
    detect_options.add_base(export)
    export.set_defaults(run=_export)

    synth = commands.add_parser("synth", help="draw synthetic parts in the layout of MVTec-AD")
    synth.add_argument("out", type=Path, metavar="OUT", help="folder that gets one folder per family")
    synth.add_argument("--families", type=_names, metavar="A,B", help="default: all")
    synth.add_argument("--train", type=int, default=4, metavar="N", help="normal pictures to learn from (default: 4)")
    synth.add_argument("--good", type=int, default=8, metavar="N", help="normal test pictures (default: 8)")
    synth.add_argument("--defective", type=int, default=8, metavar="N", help="defective test pictures (default: 8)")
    synth.add_argument("--size", type=int, default=256, help="side in pixels (default: 256)")
    detect_options.add_seed(synth)
    synth.set_defaults(run=_synth)
    return parser


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError("must be names with commas between them, but none was given")
    return names


def _synth(args: argparse.Namespace) -> int:
    from .synthetic import FAMILIES, write_dataset

    families, named = args.families or FAMILIES, renaming({"family": "--families"})
    with Progress("drawing", len(families), "family") as bar, named, disk_errors("OUT", args.out):
        write_dataset(
            args.out, families, args.train, args.good, args.defective, args.seed, args.size, lambda _: bar.update()
        )
    print(f"{len(families)} families in {args.out}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    with Progress(STARTING):
        from PIL import Image

        from . import synthetic
        from .common.drawing import montage
        from .inspection.result import caption, inspect, load_pipeline, register, table_values, write_table

    normals = {family: synthetic.normal_images(family, DEMO_SHOTS, args.seed) for family in args.families}
    counts = {"good": DEMO_PICTURES, "defective": DEMO_PICTURES}
    tests = {family: synthetic.test_samples(family, **counts, seed=args.seed) for family in args.families}
    with disk_errors("--out", args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    with Progress("loading the model"):
        pipe = load_pipeline(args.base, args.device, args.mixed_precision)

    results, rows, pictures, labels = {}, [], [], []
    with Progress("learning", len(normals) + sum(map(len, tests.values())), "picture") as bar:
        for family in args.families:
            bar.say(f"learning {family}")
            register(pipe, family, normals[family], args.seed, preset=args.preset)
            bar.update()
            bar.say(f"inspecting {family}")
            results[family] = []
            for index, sample in enumerate(tests[family]):
                (result,) = inspect(pipe, [Image.fromarray(sample.image)], family, args.seed, preset=args.preset)
                results[family].append(result)
                defect = sample.defect or "good"
                facts = {"family": family, "index": index, "defect": defect, "label": int(sample.defect is not None)}
                rows.append(facts | table_values(result.score, result.threshold, result.seconds))
                pictures.append([result.image, Image.fromarray(sample.mask), result.inpainted, result.overlay()])
                labels.append(caption(f"{family}\n{defect}", result.score, result.threshold))
                bar.update()
    titles = ["input", "true defect", "repainted", "heatmap"]
    # The teaser is for a page's top: of each family the first good and the last defective part.
    ends = [row + end for row in range(0, len(pictures), 2 * DEMO_PICTURES) for end in (0, 2 * DEMO_PICTURES - 1)]
    with disk_errors("--out", args.out):
        write_table(args.out / "results.csv", rows, DEMO_COLUMNS)
        for name, shown in (("montage.png", range(len(pictures))), ("teaser.png", ends)):
            figure = montage([pictures[i] for i in shown], titles, [labels[i] for i in shown], cell=144)
            write_whole(args.out / name, functools.partial(figure.save, format="PNG"))
    print(_demo_table(tests, results))
    print(f"\nPictures: {args.out / 'montage.png'}   Scores: {args.out / 'results.csv'}")
    return 0


def _demo_table(tests: dict, results: dict) -> str:
    """Writes a line for each family: AUROC of scores and maps, false alarms and misses, and the time."""
    from .evaluation.metrics import image_metrics, pixel_metrics

    lines = [DEMO_LINE.format("part", "image AUROC", "pixel AUROC", "false alarms", "misses", "s/picture")]
    for family, samples in tests.items():
        found = results[family]
        truths = [sample.defect is not None for sample in samples]
        image = image_metrics(truths, [result.score for result in found])["auroc"]
        pixel = pixel_metrics([sample.mask for sample in samples], [result.anomaly_map for result in found])["auroc"]
        verdicts = [(truth, result.is_defective) for truth, result in zip(truths, found, strict=True)]
        alarms = f"{verdicts.count((False, True))} of {truths.count(False)}"
        misses = f"{verdicts.count((True, False))} of {truths.count(True)}"
        seconds = sum(result.seconds for result in found) / len(found)
        lines.append(DEMO_LINE.format(family, f"{image:.3f}", f"{pixel:.3f}", alarms, misses, f"{seconds:.1f}"))
    return "\n".join(lines)


def _app(args: argparse.Namespace) -> int:
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError("The app needs gradio; run `pip install 'anomalysd-pipeline[app]'`.") from error
    from .app import space

    with space.prepared():
        from .app.page import build

        page = build()
    page.launch(server_name=args.host, server_port=args.port)
    return 0


def _detect(args: argparse.Namespace) -> int:
    with Progress(STARTING):
        from .inspection.run import run

    return run(args)


def _merge(args: argparse.Namespace) -> int:
    with Progress(STARTING):
        from .inspection.merge import run

    return run(args)


def _adapt(args: argparse.Namespace) -> int:
    with Progress(STARTING):
        from .training.run import run

    return run(args)


def _evaluate(args: argparse.Namespace) -> int:
    with Progress(STARTING):
        from .evaluation import run as _  # noqa: F401
    from .evaluate import run

    return run(args)


def _publish(args: argparse.Namespace) -> int:
    from .hub.exemplars import count_exemplars
    from .hub.publishing import push

    count = 0 if args.without_exemplars else count_exemplars(args.folder)
    if count:
        print(f"{count} normal pictures of the registered parts travel along; --without-exemplars leaves them out.")
    options = {"private": args.private or None, "create_pr": args.create_pr, "exemplars": not args.without_exemplars}
    print(push(args.folder, args.repo_id, **options))
    return 0


def _export(args: argparse.Namespace) -> int:
    from .hub.onnx_export import run

    return run(args)
