"""Fine-tuning at Stable Diffusion 1.5's real size, with random weights: nothing is downloaded.

    python benchmarks/full_size_training.py [--device cpu] [--method lora] [--threads 1]

Makes one step of the denoiser and one of the decoder from a picture of 512 px, with bfloat16 weights and gradient
checkpointing, and writes their checkpoints; then resumes for one more step of the denoiser. Prints seconds and the
peak memory so far after each. Seconds of a CPU are those of a clock on the wall: other programs lengthen them.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.full_size import FULL, PART, TINY, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the program itself")
    arguments = parser.parse_args()

    from anomalysd_pipeline.adaptation.loop import fine_tune, in_memory_accelerator
    from anomalysd_pipeline.adaptation.settings import AdaptationSettings
    from anomalysd_pipeline.common.devices import choose_device
    from anomalysd_pipeline.synthetic import normal_images

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, size = choose_device(arguments.device), TINY if arguments.tiny else FULL
    pipe = build(size, device, torch.bfloat16)
    shots = {PART: normal_images(PART, 1, seed=0, size=size["resolution"])}
    print(
        f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads, {size['resolution']} px", end=""
    )
    millions = sum(weight.numel() for weight in pipe.unet.parameters()) / 1e6
    print(f", UNet of {millions:.1f} M weights, {arguments.method}", flush=True)
    began = time.perf_counter()

    def told(progress) -> None:
        nonlocal began
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        took = time.perf_counter() - began
        print(f"{progress.stage} step {progress.step}: {took:.0f} s, loss {progress.loss:.4g}, peak {peak:.2f} GiB")
        sys.stdout.flush()
        began = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        for steps, resumed in ((1, None), (2, "latest")):
            given = {"steps": steps, "decoder_steps": 1, "method": arguments.method, "train_batch_size": 1}
            given |= {"gradient_checkpointing": True, "mixed_precision": "bf16"}
            settings = AdaptationSettings.resolve([given])
            with in_memory_accelerator(device, settings) as accelerator:
                options = {"output_dir": Path(folder), "resume_from_checkpoint": resumed, "callback": told}
                weights = fine_tune(pipe.base, shots, settings, accelerator, **options)
            if resumed is None:
                print("resumed", flush=True)
    trained = sum(value.numel() for part in (weights.denoiser, weights.decoder) for value in part.values())
    moved = sum(bool(v.any()) for n, v in weights.denoiser.items() if "lora_B" in n or arguments.method == "full")
    print(f"{trained / 1e6:.2f} M weights trained; {moved} tensors of the denoiser differ from zero")


if __name__ == "__main__":
    main()
