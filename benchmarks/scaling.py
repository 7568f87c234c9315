"""Cost against the number of pictures, masks and normal pictures: a table and a plot.

    python benchmarks/scaling.py [--model DIR|ID] [--resolution 64] [--shots 1 4 16 64] [--threads 1] [--out cost.png]

Seconds (best of `--repeat`; on a CPU those of the processor, which other programs do not lengthen) and peak memory so
far: of inspections of 1 to 16 pictures with one mask, of one picture
with 1 to 85 masks, and, for 1 to 64 normal pictures, of registering a part and of inspecting one picture of it. At
the end, how the last of each series compares with a straight line through its first and its middle: 1 is linear, less
is better.
"""

import argparse
import resource
import time


def best_of(repeat: int, function, clock) -> float:
    """Times a call, the best of several."""
    times = []
    for _ in range(repeat):
        began = clock()
        function()
        times.append(clock() - began)
    return min(times)


def measure(pipe, pictures: list[int], scales: list[tuple[int, ...]], shots: list[int], side: int, repeat: int):
    """Measures every series.

    Returns:
        name to a list of (number, seconds, peak MiB).
    """
    from anomalysd_pipeline.synthetic import normal_images

    drawn = normal_images("hex_nut", max([*pictures, *shots]), seed=0, size=side)
    few = {"preset": "fast", "num_inference_steps": 2, "noise_strength": 0.5, "mask_grouping": "none"}
    found: dict[str, list[tuple[int, float, float]]] = {}
    clock = time.perf_counter if pipe.device.type == "cuda" else time.process_time

    def note(name: str, number: int, seconds: float) -> None:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found.setdefault(name, []).append((number, seconds, memory))
        print(f"{name:>24}{number:6}{seconds:10.3f} s{memory:8.0f} MiB", flush=True)

    pipe(drawn[0], mask_scales=(1,), **few)  # these two pay for memory that is then reused
    pipe.add_category("nut", drawn[:1])
    for count in pictures:
        note(
            "pictures", count, best_of(repeat, lambda count=count: pipe(drawn[:count], mask_scales=(1,), **few), clock)
        )
    for own in scales:
        masks = sum(scale**2 for scale in own)
        note("masks", masks, best_of(repeat, lambda own=own: pipe(drawn[0], mask_scales=own, **few), clock))
    for count in shots:
        note(
            "registering shots",
            count,
            best_of(repeat, lambda count=count: pipe.add_category("nut", drawn[:count]), clock),
        )
        inspect = {"category": "nut", "mask_scales": (1,), "start": "image", **few}
        note("inspecting with shots", count, best_of(repeat, lambda inspect=inspect: pipe(drawn[0], **inspect), clock))
    return found


def growth(series) -> float:
    """Compares the last of a series with the straight line through its first and its middle."""
    (first, low, _), (second, high, _), (last, seconds, _) = series[0], series[len(series) // 2], series[-1]
    return seconds / max(low + (high - low) * (last - first) / (second - first), 1e-9)


def draw(found, path: str) -> None:
    """Plots every series, on logarithmic axes: a cost that is linear rises by 45 degrees at most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, series in found.items():
        numbers, seconds, memory = zip(*series, strict=True)
        axes[0].loglog(numbers, seconds, marker="o", label=name)
        axes[1].semilogx(numbers, memory, marker="o", label=name)
    for axis, label in zip(axes, ("seconds", "peak memory so far, MiB"), strict=True):
        axis.set(xlabel="number", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the embedded checkpoint")
    parser.add_argument("--resolution", type=int, default=None, help="default: the checkpoint's")
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="scaling.png", metavar="PNG")
    arguments = parser.parse_args()

    import torch

    from anomalysd_pipeline.inspection.result import load_pipeline

    torch.set_num_threads(arguments.threads)
    pipe = load_pipeline(arguments.model, "auto", resolution=arguments.resolution)
    side = pipe.config.resolution
    cuda = pipe.device.type == "cuda"
    print(f"{torch.cuda.get_device_name() if cuda else f'CPU, {arguments.threads} threads'}, {side} px")
    scales = [(1,), (2,), (1, 2), (4,), (1, 2, 4), (8,), (1, 2, 4, 8)]
    found = measure(pipe, arguments.pictures, scales, arguments.shots, side, arguments.repeat)
    for name, series in found.items():
        if len(series) > 2:
            print(f"{name:>24}: {growth(series):.2f} of a straight line at {series[-1][0]}")
    draw(found, arguments.out)
    print(f"plot in {arguments.out}")


if __name__ == "__main__":
    main()
