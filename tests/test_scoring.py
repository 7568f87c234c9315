import lpips
import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from safetensors.torch import save_file
from scipy import ndimage, stats
from torchvision.models import alexnet

from anomalysd_pipeline.method.scoring import fuse, harmonic_mean, image_score, scale_map, smooth, smoothing_sigma
from anomalysd_pipeline.models.perceptual import PerceptualDistance


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    # `pnet_rand` keeps AlexNet random (no download); the layer weights are the real ones of the package.
    return lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)


@pytest.fixture(scope="module")
def metric(reference):
    return PerceptualDistance.from_lpips(reference)


def pictures(n, height=70, width=97, seed=1):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class TestPerceptualDistance:
    def test_map_equals_lpips(self, reference, metric):
        x, y = pictures(2), pictures(2, seed=2)
        reference.spatial = True
        expected = reference(x, y)[:, 0].detach()
        actual = metric.distance_map(metric.features(x), metric.features(y), (70, 97))
        assert actual.dtype == torch.float32 and actual.shape == (2, 70, 97)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        assert actual.std() > 1e-3

    def test_value_equals_lpips(self, reference, metric):
        x, y = pictures(2), pictures(2, seed=2)
        reference.spatial = False
        expected = reference(x, y).flatten().detach()
        torch.testing.assert_close(metric(x, y), expected, atol=1e-5, rtol=1e-5)

    def test_one_picture_against_many(self, metric):
        x, y = pictures(1), pictures(3, seed=3)
        many = metric.distance_map(metric.features(x), metric.features(y), (20, 30))
        single = metric.distance_map(metric.features(x.expand(3, -1, -1, -1)), metric.features(y), (20, 30))
        torch.testing.assert_close(many, single, atol=1e-6, rtol=1e-5)

    def test_equal_pictures_are_at_distance_zero(self, metric):
        assert (metric(pictures(1), pictures(1)) == 0).all()

    def test_gradient_reaches_the_picture_and_matches_lpips(self, reference, metric):
        reference.spatial = False
        gradients = []
        for loss in (metric, reference):
            y = pictures(1, seed=2).requires_grad_()
            loss(pictures(1), y).sum().backward()
            gradients.append(y.grad)
        torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-3)
        assert gradients[0].abs().max() > 0
        assert all(p.grad is None for p in metric.parameters())

    def test_gradient_is_finite_where_all_channels_are_zero(self):
        metric = PerceptualDistance(channels=(2, 2, 2, 2, 2))
        metric.convs[0].bias.fill_(-100.0)
        y = pictures(1, seed=2).requires_grad_()
        metric(pictures(1), y).sum().backward()
        assert torch.isfinite(y.grad).all()

    def test_half_precision_gives_finite_float32_maps(self, metric):
        half = PerceptualDistance(channels=(64, 192, 384, 256, 256))
        half.load_state_dict(metric.state_dict())
        half.to(torch.bfloat16)
        x, y = pictures(1), pictures(1, seed=2)
        value = half(x, y)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, metric(x, y), rtol=0.05, atol=0)

    def test_rejects_other_inputs(self, metric):
        for shape in ((3, 64, 64), (1, 1, 64, 64), (1, 3, 30, 64)):
            with pytest.raises(ValueError, match="`x`"):
                metric.features(torch.zeros(shape))
        assert len(metric.features(torch.zeros(1, 3, 31, 31))) == 5


class TestPerceptualDistanceWeights:
    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    def test_from_files(self, tmp_path, suffix):
        torch.manual_seed(3)
        features = alexnet(weights=None).features
        state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
        path = tmp_path / f"alexnet.{suffix}"
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
        metric = PerceptualDistance.from_files(path)

        shipped = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        for layer, lin in enumerate(metric.lins):
            assert torch.equal(lin, shipped.lins[layer].model[1].weight)
        x = pictures(1)
        expected = features[:12]((x - shipped.scaling_layer.shift) / shipped.scaling_layer.scale)
        expected = expected / (expected.square().sum(1, keepdim=True).sqrt() + 1e-10)
        torch.testing.assert_close(metric.features(x)[-1], expected.detach(), atol=1e-6, rtol=1e-4)

    def test_from_files_rejects_wrong_files(self, tmp_path):
        with pytest.raises(ValueError, match="`alexnet_path`"):
            PerceptualDistance.from_files(tmp_path / "absent.pth")
        torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="`alexnet_path` must hold"):
            PerceptualDistance.from_files(tmp_path / "other.pth")

    def test_from_files_rejects_negative_layer_weights(self, tmp_path, reference):
        state = {key: -tensor for key, tensor in reference.state_dict().items() if key.startswith("lin0")}
        torch.save(state, tmp_path / "lin.pth")
        save_file(
            {f"features.{k}": v for k, v in alexnet(weights=None).features.state_dict().items()},
            tmp_path / "alexnet.safetensors",
        )
        with pytest.raises(ValueError, match="non-negative"):
            PerceptualDistance.from_files(tmp_path / "alexnet.safetensors", tmp_path / "lin.pth")

    def test_from_lpips_rejects_other_networks(self):
        with pytest.raises(ValueError, match="`lpips_module`"):
            PerceptualDistance.from_lpips(lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False))

    def test_rejects_other_numbers_of_layers(self):
        with pytest.raises(ValueError, match="`channels`"):
            PerceptualDistance(channels=(4, 4))

    def test_save_and_load(self, tmp_path):
        metric = PerceptualDistance(channels=(4, 5, 6, 7, 8))
        metric.save_pretrained(tmp_path)
        loaded = PerceptualDistance.from_pretrained(tmp_path)
        state, expected = loaded.state_dict(), metric.state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
        x, y = pictures(2), pictures(2, seed=2)
        torch.testing.assert_close(loaded(x, y), metric(x, y))
        assert not any(p.requires_grad for p in loaded.parameters())


class TestFusion:
    def test_scale_map_takes_each_cell_from_its_pass(self):
        distances = torch.rand(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
        masks = torch.zeros(4, 1, 6, 8)
        expected = np.empty((2, 6, 8), np.float32)
        for p, (rows, columns) in enumerate(
            (r, c) for r in (slice(0, 3), slice(3, 6)) for c in (slice(0, 4), slice(4, 8))
        ):
            masks[p, 0, rows, columns] = 1
            expected[:, rows, columns] = distances[:, p, rows, columns]
        np.testing.assert_array_equal(scale_map(masks, distances), expected)
        np.testing.assert_array_equal(scale_map(masks, distances[1]), expected[1])

    def test_harmonic_mean_equals_scipy(self):
        maps = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0)) * 10 + 1e-4
        np.testing.assert_allclose(harmonic_mean(maps), stats.hmean(maps.double().numpy(), axis=0), rtol=1e-5)

    def test_harmonic_mean_is_zero_where_a_scale_is_zero(self):
        maps = torch.tensor([[0.0, 0.0, 2.0], [1.0, 0.0, 2.0], [5.0, 0.0, 2.0]])
        assert harmonic_mean(maps).tolist() == [0.0, 0.0, 2.0]

    def test_harmonic_mean_of_extreme_values(self):
        maps = torch.tensor([[1e-42, 1e-42, 3e38], [1.0, 1e-42, 3e38]])
        expected = stats.hmean(maps.double().numpy(), axis=0)
        np.testing.assert_allclose(harmonic_mean(maps).double(), expected, rtol=2e-3)

    def test_fuse(self):
        s, p, e = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
        np.testing.assert_allclose(fuse(s, p), 0.9 * s.numpy() + 0.1 * p.numpy(), rtol=1e-6)
        np.testing.assert_allclose(
            fuse(s, p, e, 0.25, 0.5), 0.75 * s.numpy() + 0.25 * p.numpy() + 0.5 * e.numpy(), rtol=1e-6
        )
        assert torch.equal(fuse(s), s)
        assert torch.equal(fuse(s, p, e), fuse(s, p))

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            ({"prototype_weight": 1.5}, "prototype_weight"),
            ({"feature_weight": -1}, "feature_weight"),
            ({"feature_weight": float("nan")}, "feature_weight"),
            ({"prototype": torch.zeros(1, 4, 4)}, "prototype"),
            ({"feature": torch.zeros(2, 4, 1)}, "feature"),
        ],
    )
    def test_fuse_rejects(self, arguments, name):
        with pytest.raises(ValueError, match=f"`{name}`"):
            fuse(torch.zeros(2, 4, 4), **arguments)


class TestSmoothing:
    @pytest.mark.parametrize("sigma", [0.2, 0.7, 2.0, 4.0])
    @pytest.mark.parametrize("size", [(40, 33), (5, 64), (1, 3)])
    def test_equals_scipy(self, sigma, size):
        maps = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
        expected = [ndimage.gaussian_filter(m.double().numpy(), sigma, mode="reflect", truncate=4.0) for m in maps]
        np.testing.assert_allclose(smooth(maps, sigma), expected, atol=1e-5)

    def test_sigma_zero_changes_nothing(self):
        maps = torch.rand(1, 4, 4)
        assert torch.equal(smooth(maps, 0), maps)

    def test_leaves_its_input_alone(self):
        maps = torch.rand(1, 8, 8)
        before = maps.clone()
        smooth(maps, 1.0)
        assert torch.equal(maps, before)

    @pytest.mark.parametrize("sigma", [-1.0, float("inf"), float("nan")])
    def test_rejects(self, sigma):
        with pytest.raises(ValueError, match="`sigma`"):
            smooth(torch.zeros(1, 4, 4), sigma)

    def test_sigma_scales_with_the_resolution(self):
        assert [smoothing_sigma(512), smoothing_sigma(256), smoothing_sigma(1024, 2.0)] == [4.0, 2.0, 4.0]

    @pytest.mark.parametrize(("share", "count"), [(0.0, 1), (0.004, 1), (0.01, 2), (0.5, 100), (1.0, 200)])
    def test_image_score_of_a_share_is_the_mean_of_the_highest(self, share, count):
        maps = torch.rand(3, 10, 20, generator=torch.Generator().manual_seed(0))
        expected = np.sort(maps.numpy().reshape(3, -1), axis=1)[:, -count:].mean(axis=1)
        np.testing.assert_allclose(image_score(maps, share), expected, rtol=1e-6)

    def test_image_score_is_the_maximum(self):
        maps = torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(0))
        np.testing.assert_array_equal(image_score(maps), maps.numpy().max(axis=(1, 2)))


def test_offloading_hooks_run_for_every_use(metric):
    """Model offloading moves a module in its hook, which usually sits in `forward`; these two are other methods."""

    class Recorder(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    recorder = Recorder()
    add_hook_to_module(metric, recorder)
    try:
        features = metric.features(pictures(1))
        metric.distance_map(features, features, (8, 8))
    finally:
        remove_hook_from_module(metric)
    assert recorder.calls == 2
