"""The loop that every stage shares: accelerate for devices and precision, atomic checkpoints, a JSON-lines log, a
fixed evaluation."""

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel


def stage_arguments(description: str, steps: int, batch_size: int, learning_rate: float) -> argparse.ArgumentParser:
    """The options every stage has; a stage adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("embedded-training"), help="folder of pools, checkpoints and logs"
    )
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch_size", type=int, default=batch_size, help="per process")
    parser.add_argument("--learning_rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=3000, help="number of drawn pictures")
    parser.add_argument("--pool_workers", type=int, default=1, help="processes that draw them")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument(
        "--evaluate_every", type=int, default=500, help="steps between evaluations, each followed by a checkpoint"
    )
    return parser


def train(
    name: str, model: torch.nn.Module, loss_of, evaluate, arguments, ema_decay: float = 0.999
) -> torch.nn.Module:
    """Train `model`, resuming from the last complete checkpoint of this stage; returns the averaged (EMA) model.

    Args:
        loss_of: `(model, rng, step) -> (loss, dict of floats)`; `rng` is a numpy Generator seeded by (seed, process,
            step), so a resumed run sees the pictures that an uninterrupted one would have seen.
        evaluate: `model -> dict of floats`, on fixed pictures; logged as `raw_…`, and of the EMA weights as `eval_…`.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    AcceleratorState._reset_state()  # an earlier run in this process may have asked for another precision
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    folder = arguments.work / name
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=1e-4)
    warmup = min(200, arguments.steps // 10)

    def rate(step: int) -> float:
        ramp = min(1.0, (step + 1) / (warmup + 1))
        return ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / arguments.steps))))

    averaged = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75)
    averaged.to(accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(averaged)
    step = 0
    checkpoints = sorted(folder.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.split("-")[1]))
    if checkpoints:
        accelerator.load_state(checkpoints[-1])
        step = int(checkpoints[-1].name.split("-")[1])
        accelerator.print(f"{name}: resumed at step {step}")

    def save_checkpoint() -> None:
        target, temporary = folder / f"checkpoint-{step}", folder / "checkpoint-partial"
        shutil.rmtree(temporary, ignore_errors=True)
        accelerator.save_state(temporary)
        os.replace(temporary, target)
        for old in folder.glob("checkpoint-[0-9]*"):
            if old != target:
                shutil.rmtree(old)

    def log(**facts) -> None:
        if accelerator.is_main_process:
            with open(folder / "log.jsonl", "a") as stream:
                stream.write(json.dumps(facts) + "\n")
            print(
                name,
                " ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in facts.items()),
                flush=True,
            )

    began, running = time.time(), []
    while step < arguments.steps:
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * rate(step)
        rng = np.random.default_rng([arguments.seed, accelerator.process_index, step])
        torch.manual_seed(int(rng.integers(2**31)))
        with accelerator.autocast():
            loss, facts = loss_of(model, rng, step)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averaged.step(model.parameters())
        step += 1
        running.append({"loss": loss.item(), **facts})
        if step % 50 == 0 or step == arguments.steps:
            means = {key: float(np.mean([r[key] for r in running])) for key in running[0]}
            log(step=step, seconds=round(time.time() - began, 1), **means)
            running = []
        if step % arguments.evaluate_every == 0 or step == arguments.steps:
            model.eval()
            with torch.no_grad():
                log(step=step, **{f"raw_{key}": value for key, value in evaluate(model).items()})
                averaged.store(model.parameters())
                averaged.copy_to(model.parameters())
                log(step=step, **{f"eval_{key}": value for key, value in evaluate(model).items()})
            model.train()
            averaged.restore(model.parameters())
            if accelerator.is_main_process:
                save_checkpoint()
            accelerator.wait_for_everyone()
    model = accelerator.unwrap_model(model)
    averaged.copy_to(model.parameters())
    return model.eval()
