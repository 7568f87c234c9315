"""Training pictures: a pool of drawn normal parts on disk, made once by worker processes and read into memory.

Drawing costs more than a training step on a small machine, so the stages share one pool and vary it by crops and
flips. Picture number i depends on (seed, i) alone: the pool is the same however many workers draw it, an interrupted
pool is continued where it stopped, and several commands can draw one at the same time.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from anomalysd_pipeline.synthetic import FAMILIES, UNSEEN, draw_normal, draw_surface

TRAINED = tuple(name for name in FAMILIES if name not in UNSEEN)
SURFACE = "surface"
SURFACE_SHARE = 0.45
CHUNK = 250


def draw_pool_picture(seed: int, index: int, size: int):
    """One normal picture: a part of a trained family, or (45 %) a random surface for breadth."""
    rng = np.random.default_rng([seed, index])
    if rng.random() < SURFACE_SHARE:
        return draw_surface(rng, size)
    return draw_normal(TRAINED[int(rng.integers(len(TRAINED)))], rng, size)


def _draw_chunk(folder: Path, seed: int, chunk: int, size: int) -> None:
    samples = [draw_pool_picture(seed, chunk * CHUNK + i, size) for i in range(CHUNK)]
    packed = {
        "images": np.stack([s.image for s in samples]),
        "foregrounds": np.stack([np.packbits(s.foreground, axis=-1) for s in samples]),
        "families": np.array([s.family for s in samples]),
    }
    # Named after the process: commands that share a pool may draw the same chunk at the same time.
    temporary = folder / f"{chunk:05d}.{os.getpid()}.partial.npz"
    np.savez(temporary, **packed)
    os.replace(temporary, folder / f"{chunk:05d}.npz")


class Pool:
    """Pictures [N, S, S, 3] uint8, foregrounds [N, S, S] bool and family names, drawn on first use.

    Args:
        folder: where the pool lives; reused when it was drawn with the same seed and size.
        count: number of pictures, rounded up to a multiple of 250.
    """

    def __init__(self, folder, count: int, seed: int, size: int, workers: int = 1):
        self.folder, self.size = Path(folder), size
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {"seed": seed, "size": size, "families": list(TRAINED), "surface_share": SURFACE_SHARE}
        note = self.folder / "pool.json"
        if note.exists() and json.loads(note.read_text()) != facts:
            raise ValueError(
                f"`folder` {folder} holds a pool drawn with other settings; give another folder or delete it."
            )
        if not note.exists():
            temporary = self.folder / f"pool.{os.getpid()}.partial.json"
            temporary.write_text(json.dumps(facts))
            os.replace(temporary, note)
        chunks = -(-count // CHUNK)
        missing = [c for c in range(chunks) if not (self.folder / f"{c:05d}.npz").exists()]
        with ProcessPoolExecutor(workers) as executor:
            jobs = [executor.submit(_draw_chunk, self.folder, seed, c, size) for c in missing]
            for job in tqdm(jobs, desc="drawing the pool", unit="x250", disable=not jobs):
                job.result()
        parts = [np.load(self.folder / f"{c:05d}.npz") for c in range(chunks)]
        self.images = np.concatenate([p["images"] for p in parts])
        self.foregrounds = np.unpackbits(
            np.concatenate([p["foregrounds"] for p in parts]), axis=-1, count=size
        ).astype(bool)
        self.families = np.concatenate([p["families"] for p in parts])

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rng: np.random.Generator, count: int, crop: int | None = None, zoom_out: float = 0.0):
        """A random batch: images float32 [n, 3, s, s] in [-1, 1], foregrounds float32 [n, 1, s, s], family names.

        Args:
            crop: side of a random crop; None takes whole pictures.
            zoom_out: probability that a picture is shrunk to the crop's size instead of cropped, so that crops see
                whole parts too.
        """
        images, foregrounds, names = [], [], []
        for index in rng.integers(len(self), size=count):
            image, foreground = self.images[index], self.foregrounds[index]
            if crop is not None and rng.random() < zoom_out:
                factor = self.size // crop
                image = image.reshape(crop, factor, crop, factor, 3).mean((1, 3))
                foreground = foreground[::factor, ::factor]
            elif crop is not None:
                y, x = rng.integers(self.size - crop + 1, size=2)
                image, foreground = image[y : y + crop, x : x + crop], foreground[y : y + crop, x : x + crop]
            turns, flip = int(rng.integers(4)), rng.random() < 0.5
            image, foreground = np.rot90(image, turns), np.rot90(foreground, turns)
            if flip:
                image, foreground = image[:, ::-1], foreground[:, ::-1]
            images.append(np.ascontiguousarray(image, dtype=np.float32) / 127.5 - 1.0)
            foregrounds.append(np.ascontiguousarray(foreground, dtype=np.float32)[None])
            names.append(str(self.families[index]))
        return (
            torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(np.stack(foregrounds)),
            names,
        )
