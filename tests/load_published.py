"""A program that loads a published pipeline and inspects a picture: how strangers use it, in a process of their own.

python load_published.py SOURCE PICTURE CATEGORY OUT.npz [--adaptation SOURCE] [--package | --forbid-package]
"""

import argparse
import json
import sys


class Forbidden:
    """An importer that knows no `anomalysd_pipeline`, whatever is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "anomalysd_pipeline":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("source", "picture", "category", "out"):
        parser.add_argument(name)
    parser.add_argument("--adaptation")
    parser.add_argument("--package", action="store_true")
    parser.add_argument("--forbid-package", action="store_true")
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

        pipe = DiffusionPipeline.from_pretrained(args.source, custom_pipeline=args.source, trust_remote_code=True)
    if args.adaptation:
        pipe.load_adaptation(args.adaptation)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(Image.open(args.picture), category=args.category)
    np.savez(args.out, maps=out.anomaly_maps, scores=out.pred_scores)
    facts = {"labels": out.pred_labels, "module": type(pipe).__module__, "categories": pipe.categories}
    facts["package"] = "anomalysd_pipeline" in sys.modules
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
