"""Time and memory of loading a checkpoint, registering a part and inspecting pictures.

    python benchmarks/inspection.py [--model DIR|ID] [--preset fast] [--pictures 8] [--threads 2]

Prints the device, seconds to load, to register 4 normal pictures, to calibrate with them, and per inspected picture
(median), and the peak memory of the process. Where the processor computes in bfloat16, each picture is inspected in
full and in mixed precision, and from the image itself where exemplars are the start, one after the other. The first
picture is left out of the median: it pays for memory that is then reused.
"""

import argparse
import logging
import resource
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the embedded checkpoint")
    parser.add_argument("--preset", choices=("paper", "fast"), default=None)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()

    started = time.perf_counter()
    import torch

    from anomalysd_pipeline import AnomalySDPipeline
    from anomalysd_pipeline.common.devices import resolve_precision
    from anomalysd_pipeline.synthetic import normal_images

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    imported = time.perf_counter()
    pipe = AnomalySDPipeline.from_pretrained(arguments.model)
    loaded = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    logging.getLogger("anomalysd_pipeline").setLevel(logging.ERROR)  # the threshold holds for one of the two starts
    pictures = normal_images("hex_nut", 4 + arguments.pictures + 1, seed=0)
    registering = time.perf_counter()
    pipe.add_category("hex_nut", pictures[:4])
    registered = time.perf_counter()
    pipe.calibrate("hex_nut", pictures[:4], preset=arguments.preset)
    calibrated = time.perf_counter()
    settings = pipe.settings(preset=arguments.preset, category="hex_nut")
    precisions, starts = ("no", resolve_precision("auto", pipe.device)), (settings.start, "image")
    seconds = {(precision, start): [] for precision in precisions for start in starts}
    for picture in pictures[4:]:
        for (precision, start), own in seconds.items():
            pipe.mixed_precision = precision
            began = time.perf_counter()
            pipe(picture, category="hex_nut", preset=arguments.preset, start=start)
            own.append(time.perf_counter() - began)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"device               {name}")
    print(f"settings             {settings}")
    print(f"import               {imported - started:.2f} s")
    print(f"load                 {loaded - imported:.2f} s")
    print(f"register 4 pictures  {registered - registering:.2f} s")
    print(f"calibrate with them  {calibrated - registered:.2f} s")
    for (precision, start), own in seconds.items():
        how = f"{'float32' if precision == 'no' else precision}, from the {start}, median of {len(own) - 1}"
        print(f"inspect one picture  {statistics.median(own[1:]):.2f} s ({how})")
    print(f"peak memory          {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
