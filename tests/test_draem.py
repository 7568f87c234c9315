"""DRAEM: trained by our own loop on anomalib's networks."""

import numpy as np
import pytest
import torch
from torch import nn

from anomalysd_pipeline.data.tensors import to_tensor
from anomalysd_pipeline.evaluation.peers import make_detector

pytestmark = pytest.mark.full


class TestDRAEM:
    @pytest.fixture
    def narrow(self, monkeypatch):
        """anomalib's two networks at a sixteenth of their width."""
        module = pytest.importorskip("anomalib.models.image.draem.torch_model")

        class Narrow(module.DraemModel):
            def __init__(self):
                nn.Module.__init__(self)
                self.reconstructive_subnetwork = module.ReconstructiveSubNetwork(base_width=8)
                self.discriminative_subnetwork = module.DiscriminativeSubNetwork(6, 2, base_width=4)

        monkeypatch.setattr(module, "DraemModel", Narrow)

    def test_training_follows_the_seed_alone(self, narrow, nuts, tested_nuts):
        peer = make_detector("draem", steps=2, batch_size=2, resolution=32)
        state = torch.get_rng_state()
        found = []
        for seed in (0, 0, 1):
            peer.fit("nut", nuts, seed=seed)
            found.append(peer.predict("nut", tested_nuts[2]))
        assert torch.equal(torch.get_rng_state(), state)
        np.testing.assert_array_equal(found[0].anomaly_map, found[1].anomaly_map)
        assert np.abs(found[0].anomaly_map - found[2].anomaly_map).max() > 1e-6
        assert found[0].anomaly_map.shape == (32, 32) and found[0].score == found[0].anomaly_map.max()

    def test_training_teaches_to_repair(self, narrow, nuts):
        pictures = torch.stack([to_tensor(image, 32) for image in nuts]).add(1).div(2)
        errors = []
        for steps in (1, 60):
            peer = make_detector("draem", steps=steps, batch_size=2, resolution=32)
            peer.fit("nut", nuts, seed=0)
            peer.predict("nut", nuts[0])
            network = peer._loaded[1].reconstructive_subnetwork.train()  # running statistics lag behind at first
            with torch.no_grad():
                errors.append((network(pictures) - pictures).square().mean().item())
        assert errors[1] < 0.9 * errors[0]

    def test_categories_and_a_saved_state(self, narrow, nuts, tested_nuts, tmp_path):
        peer, other = (make_detector("draem", steps=1, batch_size=2, resolution=32) for _ in range(2))
        peer.fit("nut", nuts, seed=0)
        expected = peer.predict("nut", tested_nuts[2])
        peer.fit("screw", nuts, seed=1)
        assert peer.predict("screw", tested_nuts[2]).score != expected.score
        assert peer.predict("nut", tested_nuts[2]).score == expected.score
        peer.save("nut", tmp_path / "nut.safetensors")
        other.load("nut", tmp_path / "nut.safetensors")
        np.testing.assert_array_equal(other.predict("nut", tested_nuts[2]).anomaly_map, expected.anomaly_map)

    def test_bfloat16(self, narrow, nuts, tested_nuts):
        found = []
        for precision in ("no", "bf16"):
            peer = make_detector("draem", steps=3, batch_size=2, resolution=32, mixed_precision=precision)
            peer.fit("nut", nuts, seed=0)
            found.append(peer.predict("nut", tested_nuts[2]).anomaly_map)
            assert peer.describe()["mixed_precision"] == precision
            assert all(tensor.dtype != torch.bfloat16 for tensor in peer.recall("nut").values())
        assert found[1].dtype == np.float32
        assert 0 < np.abs(found[0] - found[1]).max() < 0.05

    def test_at_its_own_width(self, nuts, tested_nuts):
        pytest.importorskip("anomalib")
        peer = make_detector("draem", steps=2, batch_size=2, resolution=32)
        peer.fit("nut", nuts, seed=0)
        assert 0 < peer.predict("nut", tested_nuts[2]).score < 1

    @pytest.mark.canary
    def test_bad_options(self, tmp_path):
        pytest.importorskip("anomalib")
        with pytest.raises(ValueError, match="`resolution` a multiple of 32"):
            make_detector("draem", resolution=100)
        with pytest.raises(ValueError, match="`mixed_precision` must be 'no' or 'bf16'"):
            make_detector("draem", mixed_precision="fp16")
        with pytest.raises(ValueError, match="`textures` must be an existing folder"):
            make_detector("draem", textures=tmp_path / "none")
