"""Another extractor for a pipeline: where `from_pretrained` makes it, and where it must not."""

import json
import shutil
import time

import numpy as np
import pytest
import timm
import torch
from diffusers import StableDiffusionInpaintPipeline
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.inspection.result import load_pipeline
from anomalysd_pipeline.models.extractor import PrototypeExtractor

from .conftest import make_tiny_pipeline
from .tiny import tiny_components

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("timm") / "vit.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(NAME).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def learned(tmp_path_factory, nuts):
    """A saved pipeline with a category, whose bank is of the features of its own extractor."""
    folder = tmp_path_factory.mktemp("learned") / "pipeline"
    pipe = make_tiny_pipeline()
    pipe.add_category("nut", nuts[:1])
    pipe.save_pretrained(folder)
    return folder


def save_bare(folder):
    """Saves an inpainting checkpoint as others publish it, and returns the components it was made of."""
    components = tiny_components()
    bare = StableDiffusionInpaintPipeline(
        **{key: components[key] for key in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    bare.save_pretrained(folder)
    return components


class TestOffline:
    """The tests' own environment sets HF_HUB_OFFLINE."""

    @pytest.fixture(autouse=True)
    def empty_caches(self, monkeypatch, tmp_path):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))

    def test_every_missing_file_is_named_in_one_sentence(self, tmp_path, capfd):
        save_bare(tmp_path / "bare")
        with pytest.raises(
            ValueError,
            match="^`pretrained_model.*` .* lacks networks: `timm_checkpoint` must give model.safetensors of tf_eff",
        ) as caught:
            AnomalySDPipeline.from_pretrained(tmp_path / "bare", resolution=64)
        said = str(caught.value)
        for part in (
            "'timm/tf_efficientnet_b6.ns_jft_in1k' on the Hub",
            f"not in '{tmp_path / 'hub'}'",
            "`alexnet_checkpoint` must give alexnet-owt-7be5be79.pth",
            f"not in '{tmp_path / 'torch' / 'checkpoints'}'",
            "HF_HUB_OFFLINE",
        ):
            assert part in said
        assert "\n" not in said and "Downloading" not in capfd.readouterr().err

    def test_what_is_given_is_not_named(self, tmp_path, weights):
        save_bare(tmp_path / "bare")
        with pytest.raises(ValueError, match="lacks networks: `alexnet_checkpoint` must give") as caught:
            AnomalySDPipeline.from_pretrained(
                tmp_path / "bare", timm_model=NAME, timm_checkpoint=weights, resolution=64
            )
        assert "timm_checkpoint" not in str(caught.value)

    def test_in_the_shell(self, tmp_path):
        save_bare(tmp_path / "bare")
        with pytest.raises(
            ValueError, match="^`--base` .*`timm_checkpoint` must give .*`alexnet_checkpoint` must give"
        ):
            load_pipeline(str(tmp_path / "bare"), "cpu", resolution=64)


class TestTimmModel:
    def test_a_bare_checkpoint(self, tmp_path, weights, nuts):
        components = save_bare(tmp_path / "bare")
        pipe = AnomalySDPipeline.from_pretrained(
            tmp_path / "bare",
            timm_model=NAME,
            timm_checkpoint=weights,
            resolution=64,
            default_preset="sota",
            perceptual=components["perceptual"],
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.add_category("nut", nuts[:1])
        assert pipe.bank["nut"].shape == (4 * 4 * 4, 192)
        torch.testing.assert_close(pipe.bank["nut"].norm(dim=1), torch.ones(64))
        options = {"num_inference_steps": 3, "mask_scales": (1,)}
        out = pipe(nuts[2], category="nut", **options)
        without = pipe(nuts[2], category="nut", feature_weight=0, **options)
        assert out.pred_scores[0] > without.pred_scores[0]
        pipe.save_pretrained(tmp_path / "saved")
        loaded = AnomalySDPipeline.from_pretrained(tmp_path / "saved")
        loaded.set_progress_bar_config(disable=True)
        assert loaded.config.default_preset == "sota" and loaded.extractor.config.model_name == NAME
        again = loaded(nuts[2], category="nut", **options)
        np.testing.assert_allclose(again.pred_scores, out.pred_scores, rtol=1e-4)

    def test_takes_the_place_of_another(self, tiny_pipeline_folder, weights, nuts):
        pipe = AnomalySDPipeline.from_pretrained(tiny_pipeline_folder, timm_model=NAME, timm_checkpoint=weights)
        assert pipe.extractor.config.model_name == NAME and pipe.config.extractor[1] == "PrototypeExtractor"
        pipe.add_category("nut", nuts[:1])
        assert pipe.bank["nut"].shape[1] == 192

    def test_not_where_prototypes_are_of_the_other(self, learned, weights, tmp_path):
        with pytest.raises(ValueError, match="`timm_model` 'vit_tiny.*resnet10t.*'nut'.*remove_category"):
            AnomalySDPipeline.from_pretrained(learned, timm_model=NAME, timm_checkpoint=weights)
        pipe = AnomalySDPipeline.from_pretrained(learned)
        pipe.remove_category("nut")
        pipe.save_pretrained(tmp_path / "emptied")
        pipe = AnomalySDPipeline.from_pretrained(tmp_path / "emptied", timm_model=NAME, timm_checkpoint=weights)
        assert pipe.extractor.config.model_name == NAME

    def test_its_own_is_kept(self, learned):
        own = AnomalySDPipeline.from_pretrained(learned)
        named = AnomalySDPipeline.from_pretrained(learned, timm_model="resnet10t")
        assert named.categories == ["nut"]
        assert all(map(torch.equal, own.extractor.parameters(), named.extractor.parameters()))
        given = PrototypeExtractor("resnet10t", normalize="layer")
        assert AnomalySDPipeline.from_pretrained(learned, extractor=given, timm_model=NAME).extractor is given

    def test_a_network_of_one_size_is_made_for_the_resolution(self, tiny_pipeline_folder, tmp_path):
        save_file(timm.create_model("xcit_nano_12_p16_224").state_dict(), tmp_path / "xcit.safetensors")
        pipe = AnomalySDPipeline.from_pretrained(
            tiny_pipeline_folder, timm_model="xcit_nano_12_p16_224", timm_checkpoint=tmp_path / "xcit.safetensors"
        )
        assert pipe.extractor.config.image_size == 64
        assert pipe.extractor(torch.zeros(1, 3, 64, 64)).shape == (1, 128, 4, 4)

    def test_reaches_the_base_of_an_adaptation(self, tmp_path):
        (tmp_path / "adaptation.json").write_text(json.dumps({"base_model": "embedded", "resolution": 256}))
        with pytest.raises(ValueError, match="`timm_model` must be a model that timm knows, got 'absent'"):
            AnomalySDPipeline.from_pretrained(tmp_path, timm_model="absent")

    def test_rejects(self, tiny_pipeline_folder, weights, tmp_path):
        with pytest.raises(ValueError, match="`timm_checkpoint` must come with a `timm_model`.*resnet10t"):
            AnomalySDPipeline.from_pretrained(tiny_pipeline_folder, timm_checkpoint=weights)
        with pytest.raises(ValueError, match="`timm_checkpoint` must be an existing weights file"):
            AnomalySDPipeline.from_pretrained(
                tiny_pipeline_folder, timm_model=NAME, timm_checkpoint=tmp_path / "absent.pth"
            )


NAN = float("nan")
PART = ("categories", "nut")
CALIBRATION = (*PART, "calibration")
PROMPTS = {"generic": {"coarse": ["a {name}"], "fine": []}, "categories": {}}
BAD_SETTINGS = [
    ("model_index.json", ("resolution",), 10**6),
    ("model_index.json", ("resolution",), "64"),
    ("model_index.json", ("rotations",), 10**12),
    ("model_index.json", ("rotations",), True),
    ("model_index.json", ("default_preset",), ["fast"]),
    ("model_index.json", ("preset_overrides",), {"fast": 5}),
    ("model_index.json", ("preset_overrides",), {"fast": {"num_inference_steps": 10**9}}),
    ("model_index.json", ("preset_overrides",), {"fast": {"mask_scales": [10**6]}}),
    ("model_index.json", ("noise_strength",), True),
    ("model_index.json", ("feature_weight",), 1e300),
    ("model_index.json", ("prompts",), []),
    ("model_index.json", ("prompts", "generic", "coarse"), ["a"] * 10**6),
    ("model_index.json", ("prompts", "generic", "fine"), ["half of \ud800"]),
    ("model_index.json", ("prompts", "categories"), {f"part {n}": PROMPTS["generic"] for n in range(10_001)}),
    ("model_index.json", ("categories",), [1]),
    ("model_index.json", ("categories",), {"../x": {}}),
    ("model_index.json", (*PART, "shots"), 10**12),
    ("model_index.json", (*PART, "adaptation"), "nobody"),
    ("model_index.json", (*PART, "region"), 5),
    ("model_index.json", (*PART, "region"), "iVBORw0KGgo="),
    ("model_index.json", (*PART, "region"), "A" * 10**6),
    ("model_index.json", (*CALIBRATION, "threshold"), 1e-320),
    ("model_index.json", (*CALIBRATION, "threshold"), NAN),
    ("model_index.json", (*CALIBRATION, "settings"), {}),
    ("model_index.json", ("adaptation",), {"rank": 10**9}),
    ("model_index.json", ("adaptations",), {"nut": 5}),
    ("model_index.json", ("unet",), 5),
    ("unet/config.json", ("layers_per_block",), 10**6),
    ("vae/config.json", ("scaling_factor",), NAN),
    ("scheduler/scheduler_config.json", ("num_train_timesteps",), 10**9),
    ("bank/config.json", ("sizes",), {"nut": 10**9}),
    ("bank/config.json", ("sizes",), {}),
    ("bank/config.json", ("dim",), "x"),
    ("adapters/config.json", ("layouts",), 5),
]
BANK = "bank/diffusion_pytorch_model.safetensors"


def pickled(folder):
    torch.save(load_file(folder / BANK), folder / "bank" / "diffusion_pytorch_model.bin")
    (folder / BANK).unlink()


def changed_bank(change):
    def edit(folder):
        tensors = load_file(folder / BANK)
        save_file(tensors | {"bank_0": change(tensors["bank_0"]).contiguous()}, folder / BANK, {"format": "pt"})

    return edit


BAD_FILES = {
    "no index": lambda folder: (folder / "model_index.json").unlink(),
    "an index that is a list": lambda folder: (folder / "model_index.json").write_text("[]"),
    "an index nested too deeply": lambda folder: (folder / "model_index.json").write_text("[" * 10**5),
    "a network cut short": lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x"),
    "a network without weights": lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
    "a pickled bank": pickled,
    "a bank of NaN": changed_bank(lambda bank: bank * NAN),
    "a bank of another width": changed_bank(lambda bank: bank[:, 1:]),
}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, nuts):
    folder = tmp_path_factory.mktemp("calibrated") / "pipeline"
    pipe = make_tiny_pipeline(rotations=1)
    pipe.add_category("nut", nuts[:2])
    pipe.calibrate("nut", nuts[:2])
    pipe.save_pretrained(folder)
    return folder


class TestDamagedOrHostile:
    def refused(self, folder):
        begin = time.monotonic()
        with pytest.raises(ValueError, match="^`") as caught:
            AnomalySDPipeline.from_pretrained(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
        assert time.monotonic() - begin < 5

    @pytest.mark.parametrize(
        ("file", "path", "value"), BAD_SETTINGS, ids=[f"{'.'.join(p)}={str(v)[:20]}" for _, p, v in BAD_SETTINGS]
    )
    def test_a_value_out_of_its_range(self, calibrated, tmp_path, file, path, value):
        folder = shutil.copytree(calibrated, tmp_path / "pipeline")
        settings = facts = json.loads((folder / file).read_text(encoding="utf-8"))
        for key in path[:-1]:
            facts = facts[key]
        facts[path[-1]] = value
        (folder / file).write_text(json.dumps(settings), encoding="utf-8")
        self.refused(folder)

    @pytest.mark.parametrize("edit", BAD_FILES)
    def test_a_damaged_file(self, calibrated, tmp_path, edit):
        folder = shutil.copytree(calibrated, tmp_path / "pipeline")
        BAD_FILES[edit](folder)
        self.refused(folder)

    def test_the_same_folder_untouched_loads(self, calibrated):
        assert AnomalySDPipeline.from_pretrained(calibrated).categories == ["nut"]
