"""Peers against computations written out by hand, on features of a small random network."""

import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from anomalysd_pipeline.data.tensors import to_tensor
from anomalysd_pipeline.evaluation.peers import PEERS, SPADE, make_detector
from anomalysd_pipeline.models.extractor import PrototypeExtractor

SIDE = 64


@pytest.fixture(scope="module")
def extractor():
    """Grids of 16 x 16, 64 + 128 channels."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return PrototypeExtractor("resnet10t", (1, 2), normalize="layer")


@torch.no_grad()
def features_of(extractor, image) -> np.ndarray:
    """[C, h, w], float64."""
    return extractor(to_tensor(image, SIDE)[None])[0].double().numpy()


def enlarge(small: np.ndarray, mode: str) -> np.ndarray:
    large = torch.nn.functional.interpolate(torch.from_numpy(small)[None, None], size=(SIDE, SIDE), mode=mode)
    return large[0, 0].numpy()


def nearest(queries: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """Euclidean distance of each row of `queries` to the nearest row of `bank`."""
    return np.array([np.sqrt(((bank - query) ** 2).sum(axis=1)).min() for query in queries])


class TestRegistry:
    def test_unknown_name(self):
        with pytest.raises(ValueError, match="`name` must be one of 'patchcore', 'padim', .*, got 'cflow'"):
            make_detector("cflow")

    def test_unknown_option(self):
        with pytest.raises(ValueError, match="`steps` is no option of 'spade'; it has backbone, levels, neighbors"):
            make_detector("spade", steps=3)

    def test_a_backbone_is_for_those_that_use_one(self, extractor):
        assert make_detector("color_patches", backbone="imagenet").name == "color_patches"
        assert make_detector("spade", backbone=extractor).backbone.extractor is extractor

    @pytest.mark.parametrize("name", ["patchcore", "padim", "draem", "winclip"])
    def test_missing_package(self, monkeypatch, name):
        monkeypatch.setitem(sys.modules, "anomalib", None)
        for module in [module for module in sys.modules if module.startswith("anomalib.")]:
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=r"pip install 'anomalysd-pipeline\[peers\]'"):
            make_detector(name)

    def test_every_name_has_a_class_of_that_name(self):
        from anomalysd_pipeline.evaluation.peers import _class_of

        assert [_class_of(name).name for name in PEERS] == list(PEERS)


class TestSPADE:
    @pytest.mark.parametrize("neighbors", [1, 2, 50])
    def test_equals_brute_force(self, extractor, nuts, tested_nuts, neighbors):
        peer = SPADE(extractor, neighbors=neighbors, resolution=SIDE)
        peer.fit("nut", nuts, seed=0)
        normal = [features_of(extractor, image) for image in nuts]
        for image in tested_nuts:
            asked = features_of(extractor, image)
            distances = [np.linalg.norm(f.mean(axis=(1, 2)) - asked.mean(axis=(1, 2))) for f in normal]
            chosen = np.argsort(distances)[:neighbors]
            gallery = np.concatenate([normal[index].reshape(len(asked), -1).T for index in chosen])
            far = nearest(asked.reshape(len(asked), -1).T, gallery).reshape(asked.shape[1:])
            expected = gaussian_filter(enlarge(far, "bilinear"), sigma=4 * SIDE / 512, mode="reflect")
            found = peer.predict("nut", image)
            np.testing.assert_allclose(found.anomaly_map, expected, atol=1e-4)
            assert found.score == pytest.approx(np.mean([distances[index] for index in chosen]), rel=1e-4)
            assert expected.max() > 0.1

    def test_bad_options(self, extractor):
        with pytest.raises(ValueError, match="`neighbors` must be at least 1"):
            SPADE(extractor, neighbors=0)


class TestPatchCore:
    @pytest.fixture(autouse=True)
    def _anomalib(self):
        pytest.importorskip("anomalib")

    def embedding(self, extractor, image) -> np.ndarray:
        """[h w, C]: the mean of 3 x 3 positions, counted with zeros outside as torch's pooling does."""
        features = features_of(extractor, image)
        padded = np.pad(features, ((0, 0), (1, 1), (1, 1)))
        h, w = features.shape[1:]
        pooled = sum(padded[:, r : r + h, c : c + w] for r in range(3) for c in range(3)) / 9
        return pooled.reshape(len(features), -1).T

    @pytest.mark.parametrize("rotations", [1, 4])
    def test_the_whole_bank_equals_brute_force(self, extractor, nuts, tested_nuts, rotations):
        options = {"coreset_sampling_ratio": 1.0, "num_neighbors": 1, "resolution": SIDE, "rotations": rotations}
        peer = make_detector("patchcore", backbone=extractor, **options)
        peer.fit("nut", nuts, seed=0)
        turned = [image.rotate(360 / rotations * step) for image in nuts for step in range(rotations)]
        bank = np.concatenate([self.embedding(extractor, image) for image in turned])
        for image in tested_nuts[::2]:
            distances = nearest(self.embedding(extractor, image), bank)
            found = peer.predict("nut", image)
            assert found.score == pytest.approx(distances.max(), rel=1e-3)
            expected = gaussian_filter(enlarge(distances.reshape(16, 16), "nearest"), sigma=4, mode="mirror")
            np.testing.assert_allclose(found.anomaly_map, expected, atol=1e-3)
            assert expected.max() > 0.05

    def test_the_coreset_follows_the_seed_alone(self, extractor, nuts, capfd):
        peer = make_detector("patchcore", backbone=extractor, resolution=SIDE)
        banks = []
        for seed in (0, 0, 1):
            states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
            peer.fit("nut", nuts, seed=seed)
            assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
            np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
            banks.append(peer.recall("nut")["memory_bank"])
        assert len(banks[0]) == int(0.1 * 3 * 16 * 16)
        assert torch.equal(banks[0], banks[1]) and not torch.equal(banks[0], banks[2])
        assert "Coreset" not in capfd.readouterr().err

    def test_a_fit_leaves_the_network_alone(self, extractor, nuts, tested_nuts):
        before = {name: tensor.clone() for name, tensor in extractor.state_dict().items()}
        peer = make_detector("patchcore", backbone=extractor, resolution=SIDE)
        peer.fit("nut", nuts, seed=0)
        peer.predict("nut", tested_nuts[2])
        assert not extractor.training
        assert all(torch.equal(tensor, before[name]) for name, tensor in extractor.state_dict().items())

    def test_a_saved_state_predicts_the_same(self, extractor, nuts, tested_nuts, tmp_path):
        peer, other = (make_detector("patchcore", backbone=extractor, resolution=SIDE) for _ in range(2))
        peer.fit("nut", nuts, seed=0)
        peer.fit("other", tested_nuts[:1], seed=0)
        peer.save("nut", tmp_path / "nut.safetensors")
        other.load("nut", tmp_path / "nut.safetensors")
        expected, found = peer.predict("nut", tested_nuts[2]), other.predict("nut", tested_nuts[2])
        assert found.score == expected.score
        np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)

    def test_bad_options(self, extractor):
        with pytest.raises(ValueError, match="`coreset_sampling_ratio` must be in"):
            make_detector("patchcore", backbone=extractor, coreset_sampling_ratio=0)
        with pytest.raises(ValueError, match="`rotations` 1, 2 or 4"):
            make_detector("patchcore", backbone=extractor, rotations=3)
        with pytest.raises(ValueError, match="`normals` must hold at least 1"):
            make_detector("patchcore", backbone=extractor, resolution=SIDE).fit("nut", [], seed=0)


class TestPaDiM:
    @pytest.fixture(autouse=True)
    def _anomalib(self):
        pytest.importorskip("anomalib")

    @pytest.mark.parametrize("count", [3, 1])
    def test_equals_brute_force(self, extractor, nuts, tested_nuts, count):
        peer = make_detector("padim", backbone=extractor, n_features=6, resolution=SIDE)
        peer.fit("nut", nuts[:count], seed=4)
        channels = peer.recall("nut")["idx"].numpy()
        assert len(set(channels)) == 6 and channels.max() < 192
        pictures = nuts if count == 3 else [nuts[0].rotate(angle) for angle in (0, 90, 180, 270)]
        normal = np.stack([features_of(extractor, image)[channels].reshape(6, -1) for image in pictures])  # [K, 6, P]
        asked = features_of(extractor, tested_nuts[2])[channels].reshape(6, -1)
        distances = []
        for position in range(asked.shape[1]):
            covariance = np.cov(normal[:, :, position], rowvar=False) + (0.01 + 1e-5) * np.eye(6)
            delta = asked[:, position] - normal[:, :, position].mean(axis=0)
            distances.append(np.sqrt(delta @ np.linalg.inv(covariance) @ delta))
        large = enlarge(np.reshape(distances, (16, 16)), "bilinear")
        expected = gaussian_filter(large, sigma=4, mode="mirror")
        found = peer.predict("nut", tested_nuts[2])
        np.testing.assert_allclose(found.anomaly_map, expected, atol=2e-3)
        assert found.score == pytest.approx(expected.max(), rel=1e-3) and expected.max() > 0.1

    def test_one_picture_needs_rotations(self, extractor, nuts):
        peer = make_detector("padim", backbone=extractor, resolution=SIDE, rotations=1)
        with pytest.raises(ValueError, match="`normals` must hold at least 2 pictures for `padim`"):
            peer.fit("nut", nuts[:1], seed=0)

    def test_the_order_of_categories_does_not_matter(self, extractor, nuts, tested_nuts):
        peer, other = (make_detector("padim", backbone=extractor, n_features=4, resolution=SIDE) for _ in range(2))
        peer.fit("nut", nuts, seed=0)
        other.fit("screw", tested_nuts, seed=1)
        other.fit("nut", nuts, seed=0)
        other.predict("screw", nuts[0])
        expected, found = peer.predict("nut", tested_nuts[2]), other.predict("nut", tested_nuts[2])
        np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)


class _TinyVision(nn.Module):
    """The parts of open_clip's VisionTransformer that WinCLIP touches: 3 x 3 patches of 80 px, width 16."""

    def __init__(self):
        super().__init__()
        self.grid_size, self.output_tokens = (3, 3), False
        self.patch = nn.Conv2d(3, 16, 80, stride=80)
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        self.patch_dropout, self.ln_pre, self.ln_post = nn.Identity(), nn.LayerNorm(16), nn.LayerNorm(16)
        self.transformer = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.mix = nn.Parameter(torch.randn(16, 16))
        self.proj = nn.Parameter(torch.randn(16, 8))

    def _global_pool(self, tokens):
        return tokens.mean(dim=1), tokens[:, 1:]

    def forward(self, images):
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        tokens = self.patch_dropout(torch.cat([self.first.expand(len(images), -1, -1), tokens], dim=1))
        tokens = self.ln_post(self.transformer(self.ln_pre(tokens).permute(1, 0, 2)).permute(1, 0, 2))
        pooled, patches = self._global_pool(tokens)
        return pooled @ self.proj, patches


class _TinyCLIP(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual, self.words = _TinyVision(), nn.EmbeddingBag(256, 8)

    def encode_image(self, images):
        return self.visual(images)

    def encode_text(self, tokens):
        return self.words(tokens)


class TestWinCLIP:
    @pytest.fixture
    def asked_for(self, monkeypatch):
        """open_clip's two functions that WinCLIP calls, making a small random model. Returns what was asked for."""
        module = pytest.importorskip("anomalib.models.image.winclip.torch_model")
        asked = []

        def create_model_and_transforms(name, pretrained):
            asked.append(pretrained)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return _TinyCLIP(), None, None

        def tokenize(texts):
            return torch.tensor([[ord(letter) % 256 for letter in text.ljust(80)[:80]] for text in texts])

        monkeypatch.setattr(
            module, "open_clip", SimpleNamespace(create_model_and_transforms=create_model_and_transforms)
        )
        monkeypatch.setattr(module, "tokenize", tokenize)
        return asked

    def test_zero_shot_is_the_same_before_and_after_a_fit(self, asked_for, nuts, tested_nuts):
        peer = make_detector("winclip")
        assert peer.zero_shot
        unseen = peer.predict("hex_nut", tested_nuts[2])
        peer.fit("screw", nuts, seed=0)
        few = peer.predict("screw", tested_nuts[2])
        peer.fit("hex_nut", [], seed=0)
        again = peer.predict("hex_nut", tested_nuts[2])
        np.testing.assert_array_equal(again.anomaly_map, unseen.anomaly_map)
        assert again.score == unseen.score != few.score
        assert unseen.anomaly_map.shape == (240, 240) and unseen.anomaly_map.dtype == np.float32

    def test_equals_anomalib_used_as_it_documents(self, asked_for, nuts, tested_nuts):
        from anomalib.models.image.winclip.torch_model import WinClipModel
        from torchvision.transforms.v2.functional import normalize, resize, to_image

        def prepare(image):
            pixels = resize(to_image(image).float() / 255, [240, 240], interpolation=3, antialias=True)
            return normalize(pixels, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])

        theirs = WinClipModel("hex nut", torch.stack([prepare(image) for image in nuts])).eval()
        expected = theirs(prepare(tested_nuts[2])[None])
        peer = make_detector("winclip")
        peer.fit("hex_nut", nuts, seed=0)
        found = peer.predict("hex_nut", tested_nuts[2])
        np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map[0].numpy(), atol=1e-5)
        assert found.score == pytest.approx(expected.pred_score.item(), abs=1e-5)

    def test_a_saved_state_predicts_the_same(self, asked_for, nuts, tested_nuts, tmp_path):
        peer, other = make_detector("winclip"), make_detector("winclip")
        peer.fit("hex_nut", nuts, seed=0)
        peer.save("hex_nut", tmp_path / "nut.safetensors")
        other.load("hex_nut", tmp_path / "nut.safetensors")
        expected, found = peer.predict("hex_nut", tested_nuts[2]), other.predict("hex_nut", tested_nuts[2])
        np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
        assert found.score == expected.score

    def test_weights_from_a_file(self, asked_for, tmp_path):
        (tmp_path / "clip.pt").write_bytes(b"weights")
        make_detector("winclip", checkpoint=tmp_path / "clip.pt")
        make_detector("winclip")
        assert asked_for == [str(tmp_path / "clip.pt"), "laion400m_e31"]
        with pytest.raises(ValueError, match="`checkpoint` must be an existing file"):
            make_detector("winclip", checkpoint=tmp_path / "none.pt")

    def test_weights_that_cannot_be_had(self, asked_for, monkeypatch):
        from anomalib.models.image.winclip import torch_model

        def fail(name, pretrained):
            raise OSError("no network")

        monkeypatch.setattr(torch_model, "open_clip", SimpleNamespace(create_model_and_transforms=fail))
        with pytest.raises(ValueError, match=r"could not load its CLIP weights \(no network\).*`checkpoint`"):
            make_detector("winclip")

    def test_missing_open_clip(self, monkeypatch):
        module = pytest.importorskip("anomalib.models.image.winclip.torch_model")
        monkeypatch.setattr(module, "open_clip", None)
        with pytest.raises(ValueError, match=r"open_clip, which is not installed; run `pip install"):
            make_detector("winclip")
