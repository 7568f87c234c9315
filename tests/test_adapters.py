"""LoRA weights beside one base: their store, their switching, and what tells bases and weights apart."""

import copy

import pytest
import torch

from anomalysd_pipeline.models import adapters
from anomalysd_pipeline.models.adapters import (
    MAX_INJECTED,
    Adapter,
    AdapterStore,
    check_fits,
    digest,
    fingerprint,
    same_fingerprint,
    switch_adapter,
    take_out_adapters,
)

from .tiny import tiny_taesd, tiny_unet, tiny_vae
from .tiny_adaptations import drawn, learned, pictures, quick_pipeline, same_tensors, weights_of

STATE = {
    "denoiser": {"b.lora_B.weight": torch.rand(4, 2), "a.lora_A.weight": torch.rand(2, 3)},
    "decoder": {"c.lora_A.weight": torch.rand(2, 3, 3, 3)},
}
OTHER = {"decoder": {"c.lora_A.weight": torch.rand(1, 3, 3, 3)}}


def equal_states(first, second):
    return first.keys() == second.keys() and all(same_tensors(first[part], second[part]) for part in first)


class TestStore:
    def test_keeps_what_is_added_under_its_name(self):
        store = AdapterStore()
        store.add("two", STATE)
        store.add("one", OTHER)
        assert store.names == ["one", "two"]
        assert equal_states(store.state("two"), STATE) and equal_states(store.state("one"), OTHER)
        assert store.state("three") == {}

    def test_replaces_and_removes(self):
        store = AdapterStore()
        store.add("one", OTHER)
        store.add("two", STATE)
        store.add("two", OTHER)
        assert equal_states(store.state("two"), OTHER)
        store.remove("one")
        store.remove("never there")
        assert store.names == ["two"] and equal_states(store.state("two"), OTHER)

    def test_does_not_change_with_what_was_given(self):
        given = {"denoiser": {"a.lora_A.weight": torch.ones(2, 3)}}
        store = AdapterStore()
        store.add("one", given)
        copied = copy.deepcopy(store)
        store.add("two", STATE)
        assert copied.names == ["one"] and equal_states(copied.state("one"), given)

    def test_save_and_load(self, tmp_path):
        store = AdapterStore()
        # Names that sort differently from the order in which they come.
        for name in ("Öse, 5 mm", "zoo", 'a.b "c"', "Zoo"):
            store.add(name, {"decoder": {"c.lora_A.weight": torch.rand(len(name), 3)}} if name != "zoo" else STATE)
        store.save_pretrained(tmp_path)
        again = AdapterStore.from_pretrained(tmp_path)
        assert again.names == store.names == sorted(store.names)
        assert all(equal_states(again.state(name), store.state(name)) for name in store.names)
        again.remove("zoo")  # a loaded one can be changed
        assert equal_states(again.state("Zoo"), store.state("Zoo"))

    def test_save_and_load_of_an_empty_one(self, tmp_path):
        AdapterStore().save_pretrained(tmp_path)
        again = AdapterStore.from_pretrained(tmp_path)
        assert again.names == []
        again.add("one", OTHER)
        assert equal_states(again.state("one"), OTHER)

    def test_follows_the_dtype(self):
        store = AdapterStore().to(torch.bfloat16)
        store.add("one", OTHER)
        assert store.state("one")["decoder"]["c.lora_A.weight"].dtype == torch.bfloat16


@pytest.fixture
def sample():
    return torch.randn(1, 9, 16, 16, generator=torch.Generator().manual_seed(0)), 5, torch.ones(1, 77, 32)


@torch.no_grad()
def run(unet, sample):
    return unet(*sample, return_dict=False)[0]


@pytest.fixture
def pipe():
    return quick_pipeline()


class TestSwitch:
    def test_an_adapter_in_and_out(self, pipe, sample):
        state = learned("nut").denoiser
        weights, base = weights_of(pipe.unet), run(pipe.unet, sample)
        switch_adapter(pipe.unet, Adapter(state), pipe)
        adapted = run(pipe.unet, sample)
        assert not torch.allclose(adapted, base, atol=1e-3)
        switch_adapter(pipe.unet, None, pipe)
        assert torch.equal(run(pipe.unet, sample), base)
        switch_adapter(pipe.unet, Adapter(state), pipe)
        assert torch.equal(run(pipe.unet, sample), adapted)
        assert same_tensors(weights_of(pipe.unet), weights)

    def test_weights_are_hashed_once(self, pipe, monkeypatch):
        hashed = []
        monkeypatch.setattr(adapters, "digest", lambda state: hashed.append(state) or digest(state))
        pipe.adapters.add("nut", {"denoiser": learned("nut").denoiser})
        for name in ("nut", None, "nut"):
            pipe.use_adaptation(name)
        assert len(hashed) == 1
        pipe.adapters.add("nut", {"denoiser": drawn(1).denoiser})
        assert pipe.adapters.adapter("nut", "denoiser").key == digest(drawn(1).denoiser)

    @pytest.mark.filterwarnings("error")
    def test_any_number_in_any_order(self, pipe, sample):
        states = [drawn(seed).denoiser for seed in range(MAX_INJECTED + 2)]
        alone = []
        for state in states:
            twin = copy.deepcopy(pipe.unet)
            switch_adapter(twin, Adapter(state), pipe)
            alone.append(run(twin, sample))
        for index in [*range(len(states)), 0, 3, 0, *reversed(range(len(states)))]:
            switch_adapter(pipe.unet, Adapter(states[index]), pipe)
            assert torch.equal(run(pipe.unet, sample), alone[index]), index
            assert len(pipe.unet.peft_config) <= MAX_INJECTED

    def test_the_longest_unused_one_makes_room(self, pipe):
        states = [drawn(seed).denoiser for seed in range(MAX_INJECTED + 1)]
        for state in [*states[:MAX_INJECTED], states[0], states[MAX_INJECTED]]:
            switch_adapter(pipe.unet, Adapter(state), pipe)
        assert set(pipe.unet.peft_config) == {digest(state) for state in [states[0], *states[2:]]}

    def test_adapters_of_different_layers_do_not_add_up(self, pipe, sample):
        state = learned("nut").denoiser
        halves = [{name: w for name, w in state.items() if ("attn1" in name) is first} for first in (True, False)]
        alone = []
        for half in halves:
            twin = copy.deepcopy(pipe.unet)
            switch_adapter(twin, Adapter(half), pipe)
            alone.append(run(twin, sample))
        for half, expected in [*zip(halves, alone, strict=True), (halves[0], alone[0])]:
            switch_adapter(pipe.unet, Adapter(half), pipe)
            assert torch.equal(run(pipe.unet, sample), expected)

    def test_taken_out_the_layers_are_those_of_the_base(self, pipe, sample):
        base, keys = run(pipe.unet, sample), pipe.unet.state_dict().keys()
        for seed in range(2):
            switch_adapter(pipe.unet, Adapter(drawn(seed).denoiser), pipe)
        assert pipe.unet.state_dict().keys() != keys
        take_out_adapters(pipe.unet)
        assert pipe.unet.state_dict().keys() == keys and torch.equal(run(pipe.unet, sample), base)
        take_out_adapters(pipe.unet)
        switch_adapter(pipe.unet, None, pipe)
        switch_adapter(pipe.unet, Adapter(drawn(0).denoiser), pipe)  # and they can come back
        assert not torch.equal(run(pipe.unet, sample), base)

    def test_a_module_that_takes_none_can_be_without(self, pipe):
        switch_adapter(tiny_taesd(), None, pipe)
        take_out_adapters(tiny_taesd())


class TestDigest:
    def test_tells_values_and_names_apart(self):
        state = STATE["denoiser"]
        assert digest(dict(reversed(state.items()))) == digest(state)
        changed = {name: weight + 1e-3 for name, weight in state.items()}
        renamed = {f"x{name}": weight for name, weight in state.items()}
        assert len({digest(state), digest(changed), digest(renamed)}) == 3


class TestFingerprint:
    def test_is_the_same_in_every_precision(self):
        modules = {"unet": tiny_unet(), "vae": tiny_vae()}
        prints = [
            fingerprint({name: copy.deepcopy(module).to(dtype) for name, module in modules.items()})
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ]
        assert all(same_fingerprint(ours, theirs) for ours in prints for theirs in prints)

    def test_ignores_adapters(self, pipe):
        before = pipe.adaptation_base()
        switch_adapter(pipe.unet, Adapter(learned("nut").denoiser), pipe)
        switch_adapter(pipe.vae, Adapter(learned("nut").decoder), pipe)
        assert pipe.adaptation_base() == before

    def test_differs_for_other_weights(self, pipe):
        assert not same_fingerprint(pipe.adaptation_base(), quick_pipeline(seed=1).adaptation_base())

    @pytest.mark.parametrize("name", ["unet", "vae", "extractor", "perceptual"])
    def test_differs_where_one_network_does(self, pipe, name):
        other = quick_pipeline(**{name: quick_pipeline(seed=1).components[name]})
        assert not same_fingerprint(pipe.adaptation_base(), other.adaptation_base())

    def test_differs_after_a_short_fine_tuning_of_all_weights(self, pipe):
        before = pipe.adaptation_base()
        for part in ("denoiser", "decoder"):
            other = quick_pipeline()
            alone = {"train_denoiser": part == "denoiser", "train_decoder": part == "decoder"}
            other.adapt({"nut": pictures("nut")}, method="full", learning_rate=1e-4, calibrate=False, **alone)
            assert not same_fingerprint(before, other.adaptation_base()), part

    @pytest.mark.parametrize("theirs", [{}, {"unet": []}, {"unet": [float("nan")] * 16}])
    def test_differs_from_what_is_none(self, theirs):
        assert not same_fingerprint(fingerprint({"unet": tiny_unet()}), theirs)


def without(state, ending):
    return {name: weight for name, weight in state.items() if not name.endswith(ending)}


class TestFitting:
    @pytest.mark.parametrize("injected", [False, True])
    def test_what_was_learned_fits(self, pipe, injected):
        weights = learned("nut")
        if injected:
            switch_adapter(pipe.unet, Adapter(drawn(1).denoiser), pipe)
            switch_adapter(pipe.vae, Adapter(drawn(1).decoder), pipe)
        check_fits(pipe.unet, weights.denoiser)
        check_fits(pipe.vae, weights.decoder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda own: own | {"conv_in.weight": torch.zeros(16, 9, 3, 3)}, "no pair"),
            (lambda own: own | {"conv_in.lora_A.weight": torch.zeros(2, 9, 3, 3)}, "no pair"),
            (lambda own: own | {"x.lora_A.weight": torch.ones(2, 2), "x.lora_B.weight": torch.ones(2, 2)}, "no pair"),
            (lambda own: without(own, "to_k.lora_B.weight"), "no pair"),
            (lambda own: {name: w[:, :1] for name, w in own.items()}, "shapes"),
            (lambda own: {name: w.T for name, w in own.items()}, "shapes"),
            (lambda own: {name: w[:0] if "_A" in name else w[:, :0] for name, w in own.items()}, "shapes"),
            (lambda own: {name: w[0] for name, w in own.items()}, "shapes"),
            (lambda own: {name: w * torch.inf for name, w in own.items()}, "not finite"),
            (lambda own: {name: w.int() for name, w in own.items()}, "not finite"),
            (lambda own: own | {f"{next(iter(own)).removesuffix('A.weight')}A.bias": torch.zeros(2)}, "besides"),
        ],
    )
    def test_anything_else_does_not(self, pipe, change, message):
        with pytest.raises(ValueError, match=message):
            check_fits(pipe.unet, change(learned("nut").denoiser))
