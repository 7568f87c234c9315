"""A program that loads a published pipeline and inspects a picture: how strangers use it, in a process of their own.

python load_published.py SOURCE PICTURE CATEGORY OUT.npz [--adaptation SOURCE] [--after SOURCE] [--all]
    [--package | --forbid-package] [--paper]
"""

import argparse
import importlib
import inspect
import json
import os
import sys


class Forbidden:
    """An importer that knows no `anomalysd_pipeline`, whatever is installed."""

    def find_spec(self, name, path=None, target=None):
        if name == "anomalysd_pipeline":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def everything_else(pipe, source: str, picture, category: str, scores) -> None:
    """Fine-tunes, saves, loads again and publishes, all in the folder that the process runs in."""
    import numpy as np
    from diffusers import DiffusionPipeline

    assert "def __call__" in inspect.getsource(type(pipe))
    try:
        type(pipe).from_pretrained()
    except ValueError as error:
        assert "embedded checkpoint comes with the installed package" in str(error)
    else:
        raise AssertionError("an embedded checkpoint that is not there was loaded")
    pipe.save_pretrained("saved")
    again = DiffusionPipeline.from_pretrained("saved", custom_pipeline=source, trust_remote_code=True)
    assert type(again) is type(pipe) and type(again.bank) is type(pipe.bank)
    assert np.array_equal(again(picture, category=category).pred_scores, scores)
    assert np.array_equal(type(pipe).from_pretrained("saved")(picture, category=category).pred_scores, scores)
    pipe.adapt({"other": [picture]}, steps=1, decoder_steps=1, rank=2, train_batch_size=1, mixed_precision="no")
    assert pipe(picture, category="other").pred_labels[0] is not None
    importlib.import_module("anomalysd_pipeline.hub.publishing").export(pipe, "published")
    for name in ("pipeline.py", "bank/anomalysd_pipeline.models.bank.py"):
        with open(os.path.join(source, name)) as one, open(os.path.join("published", name)) as other:
            assert one.read() == other.read()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("source", "picture", "category", "out"):
        parser.add_argument(name)
    parser.add_argument("--adaptation")
    parser.add_argument("--after", help="another published pipeline, which the process loads first")
    parser.add_argument("--package", action="store_true")
    parser.add_argument("--forbid-package", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--paper", action="store_true", help="by the paper's score, pass by pass")
    args = parser.parse_args()
    if args.forbid_package:
        sys.meta_path.insert(0, Forbidden())

    import numpy as np
    from PIL import Image

    if args.package:
        from anomalysd_pipeline import AnomalySDPipeline

        pipe = AnomalySDPipeline.from_pretrained(args.source)
    else:
        from diffusers import DiffusionPipeline

        for source in filter(None, (args.after, args.source)):
            pipe = DiffusionPipeline.from_pretrained(source, custom_pipeline=source, trust_remote_code=True)
    if args.adaptation:
        pipe.load_adaptation(args.adaptation)
    pipe.set_progress_bar_config(disable=True)
    asked = {"feature_weight": 0.0, "mask_grouping": "grouped"} if args.paper else {}
    out = pipe(Image.open(args.picture), category=args.category, **asked)
    np.savez(args.out, maps=out.anomaly_maps, scores=out.pred_scores)
    facts = {"labels": out.pred_labels, "module": type(pipe).__module__, "categories": pipe.categories}
    facts["installed"] = os.path.isfile(getattr(sys.modules.get("anomalysd_pipeline"), "__file__", ""))
    if args.all:
        everything_else(pipe, args.source, Image.open(args.picture), args.category, out.pred_scores)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
