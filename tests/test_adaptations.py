"""Several adaptations on one base: learned, switched, replaced and removed, each as if it were alone."""

import numpy as np
import pytest
import torch

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.method.prompts import PromptBook
from anomalysd_pipeline.models.adapters import MAX_INJECTED

from .tiny import tiny_taesd
from .tiny_adaptations import (
    adapted_to,
    drawn,
    inpainted,
    inspected,
    learned,
    pictures,
    quick_pipeline,
    same_tensors,
    weights_of,
)
from .tiny_training import assert_bit_equal


@pytest.fixture
def pipe():
    return quick_pipeline()


@pytest.fixture(scope="module")
def alone():
    """The map of each part by a pipeline that holds only its adaptation, and by one that only knows its prototypes."""
    plain = quick_pipeline()
    maps = {}
    for part in ("nut", "ring", "gear"):
        plain.add_category(part, pictures(part))
        maps[part] = inspected(adapted_to(part), part, part)
        maps[part, "plain"] = inspected(plain, part, part)
    return maps


class TestAdapt:
    def test_registers_and_calibrates(self, pipe):
        weights = pipe.adapt({"nut": pictures("nut")})
        assert pipe.adaptations == pipe.categories == ["nut"]
        record = pipe.config.categories["nut"]
        assert record["adaptation"] == "nut" and record["shots"] == 2
        result = pipe(pictures("nut")[0], category="nut")
        assert result.thresholds == [record["calibration"]["threshold"]] and result.pred_labels == [False]
        assert {stage: len(values) for stage, values in weights.losses.items()} == {"denoiser": 2, "decoder": 2}
        assert pipe.config.adaptations["nut"]["settings"] == weights.settings.to_dict()

    def test_changes_the_maps_of_its_category_alone(self, pipe, alone):
        pipe.add_category("plain", pictures("nut"))
        before = {category: inspected(pipe, category) for category in ("plain", "unknown", None)}
        adapted_to("nut", pipe=pipe)
        assert (inspected(pipe, "nut") - alone["nut", "plain"]).abs().max() > 1e-4
        for category, expected in before.items():
            assert torch.equal(inspected(pipe, category), expected), category

    def test_a_part_that_is_registered_again_has_no_adaptation(self, pipe):
        adapted_to("nut", pipe=pipe)
        pipe.add_category("nut", pictures("nut"))
        assert pipe.config.categories["nut"]["adaptation"] is None and pipe.adaptations == []

    def test_leaves_the_base_weights(self, pipe):
        modules = {"unet": pipe.unet, "vae": pipe.vae}
        before = {name: weights_of(module) for name, module in modules.items()}
        pipe.adapt({"nut": pictures("nut")}, calibrate=False)
        inspected(pipe, "nut")
        assert pipe.unet is modules["unet"] and pipe.vae is modules["vae"]
        assert all(same_tensors(weights_of(module), before[name]) for name, module in modules.items())

    def test_without_calibration_there_is_no_threshold(self, pipe):
        adapted_to("nut", pipe=pipe)
        assert pipe.config.categories["nut"]["calibration"] is None

    @pytest.mark.parametrize(("part", "other"), [("denoiser", "decoder"), ("decoder", "denoiser")])
    def test_of_one_part_alone(self, pipe, alone, part, other):
        pipe.adapt({"nut": pictures("nut")}, calibrate=False, **{f"train_{other}": False})
        assert pipe.adapters.state("nut").keys() == {part}
        difference = (inspected(pipe, "nut") - alone["nut", "plain"]).abs().max()
        assert difference > 1e-5
        adapted_to("ring", pipe=pipe)  # trained in both parts
        assert (inspected(pipe, "nut") - alone["nut", "plain"]).abs().max() == difference

    def test_of_two_categories_at_once(self, pipe):
        shots = {part: pictures(part) for part in ("nut", "ring")}
        prompts = {"ring": ["a flat ring of steel"]}
        pipe.adapt(shots, calibrate=False, prompts=prompts)
        assert pipe.adaptations == ["nut, ring"] and pipe.categories == ["nut", "ring"]
        assert {record["adaptation"] for record in pipe.config.categories.values()} == {"nut, ring"}
        assert pipe.prompt_book.prompts("ring") == prompts["ring"]
        other = quick_pipeline()
        other.learn(shots, learned("nut", "ring"), name="elsewhere", prompts=prompts, calibrate=False)
        assert not torch.equal(inspected(other, "ring", "ring"), inspected(pipe, "ring", "ring"))  # other prompts

    def test_more_categories_than_a_name_can_hold(self, pipe):
        shots = {f"{'long ' * 8}{number}": pictures("nut") for number in range(3)}
        pipe.learn(shots, learned("nut"), calibrate=False)
        (name,) = pipe.adaptations
        assert len(name) <= 64 and "2 more" in name


class TestSeveralOnOneBase:
    def test_each_is_as_if_it_were_alone(self, alone):
        pipe = adapted_to("nut", "ring")
        adapted_to("gear", pipe=pipe)
        for part in ("nut", "ring", "gear", "nut", "gear", "ring", "nut"):  # every one after every other
            assert torch.equal(inspected(pipe, part, part), alone[part]), part

    def test_training_starts_from_the_base(self, pipe):
        adapted_to("nut", pipe=pipe)
        inspected(pipe, "nut")  # leaves its adapter switched on
        weights = pipe.adapt({"ring": pictures("ring")}, calibrate=False)
        assert_bit_equal(weights, learned("ring"))

    def test_more_than_modules_hold_at_once(self, pipe):
        parts = [f"part {number}" for number in range(MAX_INJECTED + 2)]
        expected = {}
        for number, part in enumerate(parts):
            single = quick_pipeline()
            for target in (single, pipe):
                target.learn({part: pictures("nut")}, drawn(number), calibrate=False)
            expected[part] = inspected(single, part)
        for part in [*parts, parts[0], parts[-2], parts[1]]:  # these are taken out, held, and taken out
            assert torch.equal(inspected(pipe, part), expected[part]), part
        assert len(pipe.unet.peft_config) <= MAX_INJECTED and len(pipe.vae.peft_config) <= MAX_INJECTED

    def test_pipelines_that_share_modules_do_not_mix(self):
        first = quick_pipeline()
        second = quick_pipeline(unet=first.unet, vae=first.vae)
        third = quick_pipeline(unet=first.unet, vae=first.vae)
        base = inspected(third, "nut"), inpainted(third)
        first.learn({"nut": pictures("nut")}, learned("nut"), calibrate=False)
        second.learn({"nut": pictures("nut")}, drawn(1), calibrate=False)
        apart = quick_pipeline()
        apart.learn({"nut": pictures("nut")}, drawn(1), calibrate=False)
        expected = inspected(adapted_to("nut"), "nut"), inspected(apart, "nut")
        first.set_adaptation("nut")
        chosen = inpainted(first)
        assert not torch.equal(expected[0], expected[1]) and not torch.equal(chosen, base[1])
        for _ in range(2):
            assert torch.equal(inspected(first, "nut"), expected[0])
            assert torch.equal(inpainted(third), base[1])
            assert torch.equal(inspected(second, "nut"), expected[1])
            assert torch.equal(inpainted(first), chosen)
            assert torch.equal(inspected(third, "nut"), base[0])


class TestSetAdaptation:
    def test_chooses_what_inpaint_uses(self):
        pipe = adapted_to("nut", "ring")
        results = {}
        for name in (None, "nut", "ring", "nut", None):
            pipe.set_adaptation(name)
            assert torch.equal(inpainted(pipe), results.setdefault(name, inpainted(pipe)))
        assert torch.equal(results[None], inpainted(quick_pipeline()))
        assert not torch.equal(results["nut"], results[None]) and not torch.equal(results["nut"], results["ring"])

    def test_inspections_do_not_change_the_choice_nor_follow_it(self, alone):
        pipe = adapted_to("nut", "ring")
        base = inpainted(pipe)
        assert torch.equal(inspected(pipe, "nut"), alone["nut"])
        assert torch.equal(inpainted(pipe), base)
        pipe.set_adaptation("ring")
        assert torch.equal(inspected(pipe, "nut"), alone["nut"])
        assert not torch.equal(inpainted(pipe), base)

    def test_outlives_saving_and_ends_with_the_adaptation(self, tmp_path):
        pipe = adapted_to("nut")
        base = inpainted(pipe)
        pipe.set_adaptation("nut")
        chosen = inpainted(pipe)
        pipe.save_pretrained(tmp_path)
        assert torch.equal(inpainted(pipe), chosen)
        pipe.remove_adaptation("nut")
        assert torch.equal(inpainted(pipe), base)

    def test_an_unknown_name(self):
        with pytest.raises(ValueError, match="`adaptation` must be one of nut, got 'ring'"):
            adapted_to("nut").set_adaptation("ring")


class TestReplacing:
    def test_a_category_that_is_adapted_again(self, pipe, alone):
        pipe.learn({"nut": pictures("nut")}, drawn(1), prompts={"nut": ["one nut"]}, calibrate=False)
        assert not torch.equal(inspected(pipe, "nut"), alone["nut"])
        pipe.learn({"nut": pictures("nut")}, learned("nut"), calibrate=False)
        assert pipe.prompt_book.prompts("nut") == ["one nut"]  # as `add_category` keeps them
        generic = {"nut": PromptBook.default().prompts("nut")}
        pipe.learn({"nut": pictures("nut")}, learned("nut"), prompts=generic, calibrate=False)
        assert pipe.adaptations == pipe.adapters.names == ["nut"]
        assert torch.equal(inspected(pipe, "nut"), alone["nut"])

    def test_a_category_that_moves_to_another_adaptation(self, pipe, alone):
        pipe.learn({part: pictures(part) for part in ("nut", "ring")}, drawn(1), calibrate=False)
        before = inspected(pipe, "ring", "ring")
        adapted_to("nut", pipe=pipe)
        assert pipe.adaptations == pipe.adapters.names == ["nut", "nut, ring"]
        assert torch.equal(inspected(pipe, "nut"), alone["nut"])
        assert torch.equal(inspected(pipe, "ring", "ring"), before)
        adapted_to("ring", pipe=pipe)
        assert pipe.adaptations == pipe.adapters.names == ["nut", "ring"]  # on the first one, nothing rests any more

    def test_a_name_that_others_rest_on_is_refused_at_once(self, pipe):
        pipe.learn({part: pictures(part) for part in ("nut", "ring")}, drawn(1), name="parts", calibrate=False)
        before = inspected(pipe, "ring", "ring")
        for call in (
            lambda: pipe.adapt({"nut": pictures("nut")}, name="parts", callback=pytest.fail),
            lambda: pipe.learn({"nut": pictures("nut")}, learned("nut"), name="parts"),
        ):
            with pytest.raises(ValueError, match="`name` 'parts' is that of an adaptation on which 'ring' rest; give"):
                call()
        assert torch.equal(inspected(pipe, "ring", "ring"), before)

    def test_add_category_forgets_the_adaptation(self, alone):
        pipe = adapted_to("nut", "ring")
        pipe.add_category("nut", pictures("nut"))
        assert pipe.adaptations == pipe.adapters.names == ["ring"]
        assert torch.equal(inspected(pipe, "nut"), alone["nut", "plain"])
        assert torch.equal(inspected(pipe, "ring", "ring"), alone["ring"])

    def test_remove_category_drops_an_adaptation_with_its_last_one(self, pipe):
        pipe.learn({part: pictures(part) for part in ("nut", "ring")}, drawn(1), calibrate=False)
        pipe.remove_category("ring")
        assert pipe.adaptations == ["nut, ring"]
        pipe.remove_category("nut")
        assert pipe.adaptations == pipe.adapters.names == [] and dict(pipe.config.adaptations) == {}

    def test_remove_adaptation_takes_its_categories_along(self, pipe, alone):
        pipe.add_category("plain", pictures("nut"))
        pipe.learn({"nut": pictures("nut"), "gear": pictures("gear")}, drawn(1), name="two", calibrate=False)
        adapted_to("ring", pipe=pipe)
        pipe.remove_adaptation("two")
        assert pipe.adaptations == pipe.adapters.names == ["ring"] and pipe.categories == ["plain", "ring"]
        assert "nut" not in pipe.bank and torch.equal(inspected(pipe, "ring", "ring"), alone["ring"])
        with pytest.raises(ValueError, match="`adaptation` must be one of ring, got 'two'"):
            pipe.remove_adaptation("two")


class TestFull:
    def test_replaces_the_modules_of_this_pipeline_alone(self):
        pipe = quick_pipeline()
        other = quick_pipeline(unet=pipe.unet, vae=pipe.vae)
        for each in (pipe, other):
            each.add_category("plain", pictures("nut"))
        before = inspected(other, "plain"), weights_of(other.unet), weights_of(other.vae)
        pipe.adapt({"nut": pictures("nut")}, method="full", calibrate=False)
        assert pipe.unet is not other.unet and pipe.vae is not other.vae
        assert pipe.adaptations == [] and pipe.config.categories["nut"]["adaptation"] is None
        assert torch.equal(inspected(other, "plain"), before[0])
        assert same_tensors(weights_of(other.unet), before[1]) and same_tensors(weights_of(other.vae), before[2])
        assert not torch.equal(inspected(pipe, "plain"), before[0])

    def test_takes_in_all_that_was_learned(self, pipe):
        weights, encoder = learned("nut", method="full"), weights_of(pipe.vae.encoder)
        pipe.learn({"nut": pictures("nut")}, weights, calibrate=False)
        assert same_tensors(weights_of(pipe.unet), weights.denoiser)
        vae = weights_of(pipe.vae)
        assert weights.decoder and all(torch.equal(vae[name], weight) for name, weight in weights.decoder.items())
        assert same_tensors(weights_of(pipe.vae.encoder), encoder)

    def test_drops_thresholds_of_the_old_weights(self, pipe):
        pipe.add_category("plain", pictures("nut"))
        pipe.calibrate("plain", pictures("nut"))
        pipe.adapt({"nut": pictures("nut")}, method="full")
        assert pipe.config.categories["plain"]["calibration"] is None
        assert pipe(pictures("nut")[0], category="plain").thresholds == [None]
        assert pipe(pictures("nut")[0], category="nut").thresholds != [None]

    def test_is_refused_while_adaptations_rest_on_the_base(self):
        pipe = adapted_to("nut", "ring")
        for call in (
            lambda: pipe.adapt({"gear": pictures("gear")}, method="full", callback=pytest.fail),
            lambda: pipe.learn({"gear": pictures("gear")}, learned("nut", method="full")),
        ):
            with pytest.raises(ValueError, match="`method` 'full' would change the base that 'nut', 'ring' rest on"):
                call()
        with pytest.raises(ValueError, match="`load_lora_weights` would change the base that 'nut', 'ring' rest on"):
            pipe.load_lora_weights({})
        assert pipe.categories == ["nut", "ring"]

    def test_after_adapters_were_in_use(self, pipe):
        adapted_to("nut", pipe=pipe)
        inspected(pipe, "nut")
        pipe.remove_adaptation("nut")
        weights = pipe.adapt({"nut": pictures("nut")}, method="full", calibrate=False)
        assert_bit_equal(weights, learned("nut", method="full"))
        assert same_tensors(weights_of(pipe.unet), weights.denoiser)

    def test_then_lora_rests_on_the_new_base(self, pipe):
        pipe.learn({"nut": pictures("nut")}, learned("nut", method="full"), calibrate=False)
        before = inspected(pipe, "nut")
        adapted_to("ring", pipe=pipe)
        inspected(pipe, "ring", "ring")
        assert torch.equal(inspected(pipe, "nut"), before)


class TestTinyAutoencoder:
    @pytest.fixture
    def pipe(self):
        return quick_pipeline(vae=tiny_taesd())

    def test_takes_no_lora_in_its_decoder(self, pipe):
        with pytest.raises(
            ValueError, match=r"`method` 'lora' needs a decoder .* AutoencoderTiny .* train_decoder=False"
        ):
            pipe.adapt({"nut": pictures("nut")}, callback=pytest.fail)
        assert pipe.categories == []

    def test_takes_lora_in_the_denoiser(self, pipe):
        pipe.adapt({"nut": pictures("nut")}, train_decoder=False, calibrate=False)
        pipe.add_category("plain", pictures("nut"))
        assert not torch.equal(inspected(pipe, "nut"), inspected(pipe, "plain"))

    def test_takes_a_full_fine_tuning(self, pipe):
        before = weights_of(pipe.vae)
        pipe.adapt({"nut": pictures("nut")}, method="full", calibrate=False)
        after = weights_of(pipe.vae)
        changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"decoder"} and np.isfinite(inspected(pipe, "nut").numpy()).all()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline with three categories, and its folder, written after its adapters have been in use."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = adapted_to("nut", "ring")
    pipe.add_category("plain", pictures("nut"))
    pipe.calibrate("nut", pictures("nut"))
    keys = {name: set(weights_of(pipe.components[name])) for name in ("unet", "vae")}
    expected = {category: inspected(pipe, category) for category in ("plain", "nut", "ring")}
    pipe.save_pretrained(folder)
    assert all(torch.equal(inspected(pipe, category), expected[category]) for category in expected)
    return pipe, folder, expected, keys


class TestSavedPipeline:
    def test_loads_as_it_was(self, saved):
        pipe, folder, expected, _ = saved
        again = AnomalySDPipeline.from_pretrained(folder)
        assert again.adaptations == ["nut", "ring"] and again.categories == ["nut", "plain", "ring"]
        for category in ("ring", "nut", "plain"):
            assert torch.equal(inspected(again, category), expected[category]), category
        assert again.config.categories == pipe.config.categories
        assert again(pictures("nut")[0], category="nut").pred_labels == [False]

    def test_holds_the_base_under_its_own_names(self, saved):
        from safetensors import safe_open

        _, folder, _, keys = saved
        for name, own in keys.items():
            with safe_open(folder / name / "diffusion_pytorch_model.safetensors", "pt") as file:
                assert set(file.keys()) == own

    @pytest.mark.parametrize(("dtype", "likeness"), [(torch.bfloat16, 0.5), (torch.float16, 0.95)])
    def test_in_half_precision(self, saved, dtype, likeness):
        pipe, folder, _, _ = saved
        half = AnomalySDPipeline.from_pretrained(folder, dtype=dtype)
        # From the image: features in half precision also change how much exemplars replace.
        maps, expected = (
            {category: inspected(each, category, start="image") for category in ("nut", "plain", "ring")}
            for each in (half, pipe)
        )
        # Rounding drifts through random weights, in the plain map as much; what the adaptation changes must be alike.
        for category in ("nut", "ring"):
            effects = [(found[category] - found["plain"]).flatten() for found in (maps, expected)]
            assert torch.corrcoef(torch.stack(effects))[0, 1] > likeness, category
        assert torch.equal(inspected(half, "nut", start="image"), maps["nut"])
