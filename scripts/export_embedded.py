"""Stage 4: put the trained parts together as the embedded checkpoint, in half precision.

    python -m scripts.export_embedded --work embedded-training --out anomalysd_pipeline/embedded

Writes a diffusers folder and replaces the old one only when the new one is complete and loads again. The extractor's
weights stay in their package, which its config names. `README.md` of the old folder is kept.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.models.bank import PrototypeBank
from anomalysd_pipeline.models.extractor import PrototypeExtractor
from anomalysd_pipeline.models.perceptual import PerceptualDistance
from scripts.recipe import BANK, DEFAULTS, EXTRACTOR, RESOLUTION, make_scheduler


def assemble(work: Path) -> AnomalySDPipeline:
    """The pipeline of the parts in `work`, float32."""
    return AnomalySDPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=make_scheduler(),
        extractor=PrototypeExtractor.from_package(**EXTRACTOR),
        perceptual=PerceptualDistance.from_pretrained(work / "perceptual"),
        bank=PrototypeBank(**BANK),
        resolution=RESOLUTION,
        **DEFAULTS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("embedded-training"))
    parser.add_argument("--out", type=Path, default=Path("anomalysd_pipeline/embedded"))
    arguments = parser.parse_args()
    new = arguments.out.with_name(arguments.out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    assemble(arguments.work).to(torch.float16).save_pretrained(new)
    for config in new.glob("*/config.json"):  # diffusers notes the folder a part was loaded from
        facts = json.loads(config.read_text())
        facts.pop("_name_or_path", None)
        config.write_text(json.dumps(facts, indent=2) + "\n")
    for weights in (new / "extractor").glob("*.safetensors"):
        weights.unlink()  # an installed package has them
    (new / "pipeline.py").unlink()  # the package is around it
    AnomalySDPipeline.from_pretrained(new)
    if (arguments.out / "README.md").exists():
        shutil.copy(arguments.out / "README.md", new)
    if arguments.out.exists():
        shutil.rmtree(arguments.out)
    os.replace(new, arguments.out)
    size = sum(f.stat().st_size for f in arguments.out.rglob("*") if f.is_file())
    print(f"{arguments.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
