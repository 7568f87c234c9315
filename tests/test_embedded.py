"""The checkpoint in the package: what a first user meets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomalysd_pipeline import EMBEDDED, AnomalySDPipeline
from anomalysd_pipeline.data.tensors import to_tensor
from anomalysd_pipeline.evaluation.metrics import pixel_metrics
from anomalysd_pipeline.method.inpainting import decode, encode
from anomalysd_pipeline.synthetic import normal_images, test_samples
from scripts.recipe import DEFAULTS

pytestmark = pytest.mark.timeout(240)  # the embedded checkpoint at its own size

FOLDER = Path(EMBEDDED)


@pytest.fixture(scope="module")
def pipe():
    pipe = AnomalySDPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_is_small_and_holds_no_code_or_pickles():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {path.suffix for path in files} <= {".json", ".md", ".safetensors", ".txt"}


def test_is_the_promised_kind_of_checkpoint(pipe):
    assert pipe.config.resolution == 256 and pipe.config.default_preset == "fast"
    assert type(pipe.vae).__name__ == "AutoencoderKL" and pipe.unet.config.in_channels == 9
    assert type(pipe.text_encoder).__name__ == "CLIPTextModel" and pipe.categories == []
    modules = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}


def test_the_autoencoder_keeps_colors_and_shapes(pipe):
    image = to_tensor(normal_images("circuit_board", 1, seed=11)[0], 256)[None]
    with torch.no_grad():
        restored = decode(pipe.vae, encode(pipe.vae, image))
    assert 10 * torch.log10(4 / (restored - image).square().mean()) > 25


def test_repainting_keeps_what_is_not_masked_and_erases_what_is(pipe):
    """A dark spot in the mask goes; the surroundings stay."""
    image = to_tensor(normal_images("brushed_metal", 1, seed=12)[0], 256)[None]
    spoiled = image.clone()
    spoiled[..., 112:144, 112:144] = -1.0
    mask = torch.zeros(1, 1, 256, 256)
    mask[..., 96:160, 96:160] = 1
    embeds = torch.zeros(1, 77, pipe.unet.config.cross_attention_dim)
    repainted = pipe.inpaint(spoiled, mask, embeds, noise_strength=0.6, num_inference_steps=10)
    inside, outside = slice(112, 144), slice(0, 80)
    before = (spoiled - image)[..., inside, inside].abs().mean()
    after = (repainted - image)[..., inside, inside].abs().mean()
    assert after < 0.6 * before
    assert (repainted - image)[..., outside, outside].abs().mean() < 0.1


def test_finds_a_drawn_defect(pipe):
    normals = normal_images("hex_nut", 4, seed=21)
    pipe.add_category("hex_nut", normals)
    samples = test_samples("hex_nut", 1, 3, seed=21)
    out = pipe([Image.fromarray(sample.image) for sample in samples], category="hex_nut")
    assert pixel_metrics([s.mask for s in samples], list(out.anomaly_maps))["auroc"] > 0.8
    assert np.isfinite(out.pred_scores).all()


def test_its_facts_are_written_down():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for subject in ("trained on", "How long", "What it is not"):
        assert subject.lower() in text.lower()
    index = json.loads((FOLDER / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "AnomalySDPipeline"


@pytest.mark.full
def test_a_short_adaptation_repaints_unseen_normal_pictures_closer():
    """What the loss on repainted pictures is for, on pictures of a product that were not trained on."""
    pipe = AnomalySDPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    normals = normal_images("perforated_sheet", 4, seed=31, size=256)
    pipe.add_category("perforated_sheet", normals[:2])
    options = {"feature_weight": 0.0, "start": "image"}  # an exemplar leaves little to repaint
    before = pipe(normals[2:], category="perforated_sheet", **options)
    pipe.adapt({"perforated_sheet": normals[:2]}, steps=8, decoder_steps=8, calibrate=False)
    after = pipe(normals[2:], category="perforated_sheet", **options)
    assert after.anomaly_maps.mean() < 0.95 * before.anomaly_maps.mean()


def test_its_way_of_adapting_is_the_recipes(pipe):
    settings = pipe.adaptation_settings()
    assert settings.to_dict() | DEFAULTS["adaptation"] == settings.to_dict()
    assert settings.method == "lora" and settings.steps <= 300
