"""Draw defective parts, their exemplars, the repainted parts and the heatmaps, a row for each part.

    python -m scripts.show_exemplars --synthetic hex_nut gear perforated_sheet wood --out docs/exemplars.png
    python -m scripts.show_exemplars --data FOLDER --categories cookies metal_plate

Each part is the first defective test picture, beside 4 good ones. The exemplar is built of patches of these.
"""

import argparse
from pathlib import Path

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.common.drawing import montage
from anomalysd_pipeline.data.tensors import to_pil
from anomalysd_pipeline.inspection.result import inspect, register
from scripts.evaluate_embedded import drawn, from_folder

TITLES = ["picture", "exemplar", "repainted", "heatmap"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("exemplars.png"))
    parser.add_argument("--data", type=Path, help="folder of categories in MVTec-AD's layout")
    parser.add_argument("--categories", nargs="*", default=[])
    parser.add_argument("--synthetic", nargs="*", default=[], help="families of drawn parts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cell", type=int, default=160, help="side of each picture in pixels")
    arguments = parser.parse_args()
    jobs = [(name, from_folder(arguments.data, name, 4, 1)) for name in arguments.categories]
    jobs += [(name, drawn(name, 4, arguments.seed, 1)) for name in arguments.synthetic]
    pipe = AnomalySDPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for name, (normals, tests) in jobs:
        register(pipe, name, normals)
        picture = next(image for image, label, _ in tests if label)
        (result,) = inspect(pipe, [picture], name)
        found = pipe._score_maps(pipe._inputs([picture]), name, pipe.settings(category=name))
        exemplar = to_pil(found.exemplars[0], (picture.height, picture.width))
        rows.append([picture, exemplar, result.inpainted, result.overlay()])
        print(f"{name}: {result.sentence}")
    montage(rows, TITLES, [name.replace("_", " ") for name, _ in jobs], cell=arguments.cell).save(arguments.out)


if __name__ == "__main__":
    main()
