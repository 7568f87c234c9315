"""Presets, and what comes before them."""

from .conftest import make_tiny_pipeline


class TestSotaPreset:
    """Fast masks, and the distance to the prototypes in the score."""

    def test_brings_a_feature_weight(self):
        pipe = make_tiny_pipeline(preset_overrides={})
        assert pipe.config.feature_weight == 0
        sota, fast = pipe.settings(preset="sota").to_dict(), pipe.settings(preset="fast", num_inference_steps=20)
        assert sota == {**fast.to_dict(), "feature_weight": 1.0, "top_share": 0.01}
        assert pipe.settings(preset="paper").feature_weight == pipe.settings(preset="fast").feature_weight == 0

    def test_what_others_say_of_the_weight_comes_first(self):
        assert make_tiny_pipeline(feature_weight=2.5).settings(preset="sota").feature_weight == 2.5
        assert make_tiny_pipeline(feature_weight=2.5).settings(preset="paper").feature_weight == 2.5
        pipe = make_tiny_pipeline(preset_overrides={"sota": {"feature_weight": 0.5}})
        assert pipe.settings(preset="sota").feature_weight == 0.5
        assert pipe.settings(preset="sota", feature_weight=0).feature_weight == 0
        assert make_tiny_pipeline(default_preset="sota").settings().feature_weight == 1
