"""Make the detector under evaluation from the options."""

from __future__ import annotations

import argparse

import torch

from ..common.console import base_errors
from .detector import Detector
from .options import INSPECTION, named
from .store import Draw

DRAEM_OPTIONS = ("steps", "batch_size", "resolution")
IMAGENET_LEVELS = (2, 3)
"""Strides 8 and 16 of EfficientNet-Lite2: at 256 px the paper's 4 and 8 cover too little of a part."""


def make_system(args: argparse.Namespace, draw: Draw, device: torch.device) -> Detector:
    """Makes the detector that the options name, before it learns anything of a draw.

    Args:
        args: parsed options, see `options.add_arguments`.
        draw: fills `{shots}` and `{seed}` in the names of a base and an adaptation.
        device: where it computes.

    Raises:
        ValueError: for options out of their range, an unusable base or a missing package; with the names of the
            options.
    """
    with named():
        return _make_peer(args, draw, device) if args.peer else _make_own(args, draw, device)


def _make_own(args: argparse.Namespace, draw: Draw, device: torch.device) -> Detector:
    from .system import AnomalySDDetector

    options = {name: getattr(args, name) for name in INSPECTION if getattr(args, name) is not None}
    adaptation = None
    if args.adapt:
        # Low-rank, whatever the checkpoint prefers: processes cannot share an adaptation of all weights.
        adaptation = {"method": "lora", "prompt_design": args.prompt_design}
        adaptation |= {"steps": args.adapt_steps, "decoder_steps": args.adapt_decoder_steps}
    return AnomalySDDetector(
        load_pipeline(args, draw, device),
        options,
        args.prompt_design,
        calibrate=not args.no_calibration,
        false_alarm_rate=args.false_alarm_rate,
        adaptation=adaptation,
    )


def needs_new_system(args: argparse.Namespace, before: Draw, now: Draw) -> bool:
    """Tells whether the draw `now` needs another detector than the draw `before`."""
    return args.peer in (None, "plain_inpainting") and any(
        _filled(name, before) != _filled(name, now) for name in (args.base, args.adaptation)
    )


def load_pipeline(args: argparse.Namespace, draw: Draw, device: torch.device):
    """Loads the pipeline that the options name, with its adaptation."""
    from .. import AnomalySDPipeline
    from ..common.devices import resolve_precision

    given = {
        "revision": args.revision,
        "variant": args.variant,
        "resolution": args.resolution,
        "timm_model": args.timm_model,
        "timm_checkpoint": None if args.timm_checkpoint is None else str(args.timm_checkpoint),
    }
    if args.timm_model == "imagenet":
        from .backbones import load_backbone

        del given["timm_model"]
        given["extractor"] = load_backbone("imagenet", IMAGENET_LEVELS).extractor
    base = _filled(args.base, draw)
    with base_errors(base):
        pipe = AnomalySDPipeline.from_pretrained(
            base,
            dtype=getattr(torch, args.dtype),
            **{name: value for name, value in given.items() if value is not None},
        ).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.mixed_precision = resolve_precision(args.mixed_precision, device)
    if args.adaptation:
        pipe.load_adaptation(_filled(args.adaptation, draw), overwrite=True)
    return pipe


def _make_peer(args: argparse.Namespace, draw: Draw, device: torch.device) -> Detector:
    if args.peer == "plain_inpainting":
        from .floors import PlainInpaintingFloor

        given = {name: getattr(args, name) for name in ("noise_strength", "num_inference_steps")}
        given = {name: value for name, value in given.items() if value is not None}
        return PlainInpaintingFloor(load_pipeline(args, draw, device), **given)
    from .peers import make_detector

    given = {}
    if args.peer == "draem":
        from ..common.devices import resolve_precision

        given = {name: getattr(args, f"draem_{name}") for name in DRAEM_OPTIONS}
        if resolve_precision(args.mixed_precision, device) == "bf16":  # fp16 would need its gradients scaled
            given["mixed_precision"] = "bf16"
    given = {name: value for name, value in given.items() if value is not None}
    with named(**{name: f"draem_{name}" for name in DRAEM_OPTIONS if name in given}, backbone="backbone"):
        return make_detector(args.peer, backbone=args.backbone, device=device, **given)


def _filled(name: str | None, draw: Draw) -> str | None:
    # Not `format`: a folder's name may have other braces.
    return name and name.replace("{shots}", str(draw.shots)).replace("{seed}", str(draw.seed))
