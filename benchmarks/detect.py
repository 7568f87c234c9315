"""Memory of an inspection of many pictures: does it grow with their number?

    python benchmarks/detect.py [--pictures 2000] [--model DIR|ID] [--resolution 64] [--threads 1] [--maps]

Draws small pictures into a temporary folder and inspects them with the loop of `anomalysd detect`, heatmaps and rows
included, at the smallest sensible setting: 64 px, one mask, one denoising step. After every 50 pictures it reads the
resident memory of the process. Prints the ends of that curve and its slope, a least-squares line over the second half:
the first half pays for memory that is then reused.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

EVERY = 50


def draw(folder: Path, count: int, side: int) -> None:
    """Writes `count` pictures: drawn nuts, each brightened by another amount so that no two are alike."""
    import numpy as np
    from PIL import Image

    from anomalysd_pipeline.synthetic import normal_images

    drawn = [np.asarray(image, dtype=np.int16) for image in normal_images("hex_nut", 16, seed=0, size=side)]
    for index in range(count):
        pixels = np.clip(drawn[index % len(drawn)] + index // len(drawn) % 64, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:06d}.png")


def resident() -> float:
    """KiB of this process in memory now; Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--model", default=None, help="default: the embedded checkpoint")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--maps", action="store_true", help="save the maps too")
    arguments = parser.parse_args()

    import numpy as np
    import torch

    from anomalysd_pipeline.data.sources import gather
    from anomalysd_pipeline.inspection.folder import ResultFolder
    from anomalysd_pipeline.inspection.result import load_pipeline, register
    from anomalysd_pipeline.inspection.run import inspect_pictures
    from anomalysd_pipeline.synthetic import normal_images

    torch.set_num_threads(arguments.threads)
    pipe = load_pipeline(arguments.model, "auto", resolution=arguments.resolution)
    options = {"preset": "fast", "num_inference_steps": 1, "noise_strength": 1.0, "mask_scales": (1,)}
    register(pipe, "hex nut", normal_images("hex_nut", 2, seed=1, size=arguments.resolution), **options)
    with tempfile.TemporaryDirectory() as work:
        pictures, out = Path(work, "pictures"), Path(work, "out")
        pictures.mkdir()
        draw(pictures, arguments.pictures, arguments.resolution)
        listing = gather([pictures], out)
        folder = ResultFolder(out, maps=arguments.maps)
        folder.begin({}, {})
        curve = [(0, resident())]

        def counted():
            for number, picture in enumerate(listing.deal(), start=1):
                yield picture  # taken up again when the picture is done
                if number % EVERY == 0:
                    curve.append((number, resident()))

        began = time.perf_counter()
        inspect_pictures(pipe, counted(), folder, "hex nut", options=options)
        seconds = time.perf_counter() - began
        folder.close()
        began, before = time.perf_counter(), resident()
        counts = folder.finish(listing)
        merging, after = time.perf_counter() - began, resident()

    half = np.array([point for point in curve if point[0] >= arguments.pictures / 2])
    slope = np.polyfit(half[:, 0], half[:, 1], 1)[0]
    device = torch.cuda.get_device_name() if pipe.device.type == "cuda" else f"CPU, {arguments.threads} threads"
    print(f"device               {device}")
    each = seconds / counts.inspected
    print(f"pictures             {counts.inspected} of {arguments.resolution} px, {each:.3f} s each")
    print(f"memory at the start  {curve[0][1] / 1024:.1f} MiB, after {EVERY}: {curve[1][1] / 1024:.1f} MiB")
    print(f"memory at the end    {curve[-1][1] / 1024:.1f} MiB, highest: {max(v for _, v in curve) / 1024:.1f} MiB")
    print(f"slope, second half   {slope:+.3f} KiB per picture, {slope * 100_000 / 1024:+.0f} MiB for 100,000")
    print(f"table and montage    {merging:.1f} s, {(after - before) / 1024:+.1f} MiB")


if __name__ == "__main__":
    main()
