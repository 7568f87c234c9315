"""Time and memory of a fine-tuning: per step, and of a whole `pipe.adapt`.

    python benchmarks/adaptation.py [--model DIR|ID] [--methods lora full] [--steps 20] [--whole [44 25]] [--threads 2]

For each method, on 4 drawn normal pictures: seconds per step of the denoiser and of the decoder (median, without the
first), the size of what was learned, and the peak memory of the process so far. `--whole` also runs as many steps of
both as it is given, or else the checkpoint's own, with registration and calibration.
"""

import argparse
import resource
import statistics
import time


def steps_of(pipe, pictures, method: str, steps: int) -> None:
    """Prints one line about a short fine-tuning that is thrown away."""
    from anomalysd_pipeline.adaptation.loop import fine_tune, in_memory_accelerator

    moments: dict[str, list[float]] = {}

    def note(progress) -> None:
        moments.setdefault(progress.stage, []).append(time.perf_counter())

    settings = pipe.adaptation_settings(method=method, steps=steps, decoder_steps=steps)
    with in_memory_accelerator(pipe.device, settings) as accelerator:
        weights = fine_tune(pipe.base, {"gear": pictures}, settings, accelerator, callback=note)
    cells = []
    for stage, times in moments.items():
        gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
        cells.append(f"{stage} {statistics.median(gaps):.2f} s")
    learned = sum(v.numel() for part in (weights.denoiser, weights.decoder) for v in part.values())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{method:5} per step: {', '.join(cells)}; {learned / 1e6:.2f} M weights learned; peak {memory:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the embedded checkpoint")
    parser.add_argument("--methods", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--whole", nargs="*", type=int, metavar="STEPS")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.whole and len(arguments.whole) != 2:
        parser.error("`--whole` takes no number, or the denoiser's steps and the decoder's.")

    import torch

    from anomalysd_pipeline import AnomalySDPipeline
    from anomalysd_pipeline.synthetic import normal_images

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = AnomalySDPipeline.from_pretrained(arguments.model).to(device)
    pipe.set_progress_bar_config(disable=True)
    pictures = normal_images("gear", 4, seed=0)
    print(torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads")
    print(pipe.adaptation_settings())
    for method in arguments.methods:
        steps_of(pipe, pictures, method, arguments.steps)
    if arguments.whole is not None:
        given = dict(zip(("steps", "decoder_steps"), arguments.whole, strict=False))
        began = time.perf_counter()
        pipe.adapt({"gear": pictures}, **given)
        print(f"pipe.adapt with 4 pictures, registration and calibration: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
