"""Adaptations as folders: what comes back, and what is refused without a trace."""

import copy
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.adaptation.folder import FACTS, WEIGHTS
from anomalysd_pipeline.data.shots import SHOT_NAMES

from .tiny_adaptations import Standing, adapted_to, defective, drawn, inspected, learned, pictures, quick_pipeline

ODD_NAMES = ["Öse 5 µm", 'the "big" one', "v1.2.json", "ring, flat", "$HOME {name} %s"]


@pytest.fixture
def pipe():
    return quick_pipeline()


@pytest.fixture(scope="module")
def source():
    """A calibrated pipeline with one adaptation for two parts, each with settings of its own."""
    pipe = quick_pipeline()
    shots = {part: pictures(part) for part in ("nut", "ring")}
    pipe.learn(shots, learned("nut", "ring"), prompts={"nut": ["a nut of steel"]}, calibrate=False)
    pipe._store_category("nut", noise_strength=0.6)
    pipe.calibrate("nut", pictures("nut"))
    return pipe


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adaptation"
    source.save_adaptation(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestSaveAndLoad:
    def test_everything_comes_back(self, source, saved, pipe):
        assert pipe.load_adaptation(saved) == ["nut", "ring"]
        assert pipe.adaptations == ["nut, ring"] and pipe.categories == ["nut", "ring"]
        assert pipe.config.categories == source.config.categories
        assert pipe.config.adaptations == source.config.adaptations
        assert pipe.prompt_book.to_dict() == source.prompt_book.to_dict()
        for part in ("ring", "nut"):
            ours, theirs = (each(defective(part), category=part) for each in (pipe, source))
            assert (ours.anomaly_maps == theirs.anomaly_maps).all() and ours.anomaly_maps.any()
            assert ours.thresholds == theirs.thresholds and (ours.thresholds != [None]) == (part == "nut")
            assert torch.equal(pipe.bank[part], source.bank[part])

    def test_is_small_and_without_the_base(self, source, saved):
        assert {path.name for path in saved.iterdir()} == {FACTS, WEIGHTS}
        tensors = load_file(saved / WEIGHTS)
        lora = {name for name in tensors if ".lora_A." in name or ".lora_B." in name}
        kinds = ("bank", "sources", *SHOT_NAMES)
        assert tensors.keys() - lora == {f"{kind}.{index}" for kind in kinds for index in range(2)}
        assert all(tensors[name].dtype == torch.float16 for name in lora)
        values = sum(weight.numel() for weight in (learned("nut", "ring").denoiser | learned("nut").decoder).values())
        assert (saved / WEIGHTS).stat().st_size < 2 * values + 4 * sum(
            b.numel() for b in source.bank.buffers()
        ) + 40000

    def test_tells_its_base(self, source, saved):
        facts = json.loads((saved / FACTS).read_text(encoding="utf-8"))
        assert facts["base_fingerprint"] == source.adaptation_base()
        assert str(saved.parent) not in (saved / FACTS).read_text(encoding="utf-8")

    @pytest.mark.parametrize("order", [1, -1])
    def test_names_of_any_characters(self, pipe, tmp_path, order):
        for number, name in enumerate(ODD_NAMES[::order]):
            pipe.learn({name: pictures("nut")}, drawn(number), prompts={name: [f"a {name}"]}, calibrate=False)
        several = dict.fromkeys(reversed(["zoo", "Zoo", "öl"]), pictures("ring"))
        pipe.learn(several, drawn(9), name="ä {}", calibrate=False)
        other = quick_pipeline()
        for number, name in enumerate(pipe.adaptations):
            pipe.save_adaptation(tmp_path / str(number), name)
            other.load_adaptation(tmp_path / str(number))
        assert other.categories == pipe.categories == sorted([*ODD_NAMES, *several])
        assert other.adaptations == pipe.adaptations and other.prompt_book.to_dict() == pipe.prompt_book.to_dict()
        for name in pipe.categories:
            assert torch.equal(other.bank[name], pipe.bank[name]), name
        for name in (ODD_NAMES[0], "öl"):
            assert torch.equal(inspected(other, name), inspected(pipe, name)), name

    def test_into_a_half_precision_base(self, source, saved, tmp_path):
        source.save_pretrained(tmp_path / "base")
        half = AnomalySDPipeline.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
        expected = inspected(half, "nut")
        for part in half.categories:
            half.remove_category(part)
        half.load_adaptation(saved)
        assert torch.equal(inspected(half, "nut"), expected)
        half.save_adaptation(tmp_path / "again")  # and from there to full precision
        again = quick_pipeline()
        again.load_adaptation(tmp_path / "again")
        for part, own in source.adapters.state("nut, ring").items():
            rounded = again.adapters.state("nut, ring")[part]
            assert all(torch.allclose(rounded[name], weight, rtol=0.004, atol=1e-6) for name, weight in own.items())

    def test_which_one_to_save(self, pipe, tmp_path):
        with pytest.raises(ValueError, match="`adaptation` must name one of none: call `adapt` first"):
            pipe.save_adaptation(tmp_path / "new")
        adapted_to("nut", "ring", pipe=pipe)
        with pytest.raises(ValueError, match="`adaptation` must name one of nut, ring"):
            pipe.save_adaptation(tmp_path / "new")
        with pytest.raises(ValueError, match="`adaptation` must be one of nut, ring, got 'gear'"):
            pipe.save_adaptation(tmp_path / "new", "gear")
        assert not (tmp_path / "new").exists()
        pipe.save_adaptation(tmp_path / "new", "ring")
        assert quick_pipeline().load_adaptation(tmp_path / "new") == ["ring"]


class TestWriting:
    def test_replaces_an_earlier_one_as_a_whole(self, folder, pipe):
        (folder / "README.md").write_text("the card of the earlier one")
        adapted_to("gear", pipe=pipe)
        pipe.save_adaptation(folder)
        assert {path.name for path in folder.iterdir()} == {FACTS, WEIGHTS}
        assert quick_pipeline().load_adaptation(folder) == ["gear"]
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def test_into_the_working_directory(self, pipe, tmp_path, monkeypatch):
        adapted_to("gear", pipe=pipe)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        pipe.save_adaptation(".")
        assert quick_pipeline().load_adaptation(tmp_path / "here") == ["gear"]

    @pytest.mark.parametrize("other", ["thesis.txt", "model_index.json", ".git/config", "unet/config.json"])
    @pytest.mark.parametrize("beside", [False, True])
    def test_a_folder_that_holds_other_things_stays(self, source, folder, other, beside):
        if not beside:
            shutil.rmtree(folder)
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_text("mine")
        before = contents(folder)
        with pytest.raises(ValueError, match="`save_directory` .* holds other things; give a new or empty folder"):
            source.save_adaptation(folder)
        assert contents(folder) == before

    def test_a_file_stays(self, source, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ValueError, match="`save_directory` .* holds other things"):
            source.save_adaptation(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    @pytest.mark.parametrize("call", [1, 2, 3])
    def test_interrupted_while_replacing(self, source, folder, monkeypatch, error, call):
        before, calls, replace = contents(folder), [], os.replace

        def interrupted(*paths):
            calls.append(paths)
            if len(calls) == call:
                raise error
            replace(*paths)

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises((ValueError, KeyboardInterrupt), match=r"^$|`save_directory` .* could not be written"):
            source.save_adaptation(folder)
        assert len(calls) == call and contents(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def test_one_that_a_killed_writer_had_completed_is_read(self, folder, pipe):
        (folder.parent / ".copy.old").mkdir()
        folder.rename(folder.parent / ".copy.new")
        assert pipe.load_adaptation(folder) == ["nut", "ring"]

    def test_interrupted_while_writing_leaves_nothing_new(self, source, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match="`save_directory` .* could not be written .No space left on device."):
            source.save_adaptation(tmp_path / "new")
        assert list(tmp_path.iterdir()) == []


def refused(pipe, folder, match, runs=True, **options):
    """Loading fails with one short sentence that names the argument, and changes nothing."""
    before = Standing(pipe, runs)
    with pytest.raises(ValueError, match=match) as caught:
        pipe.load_adaptation(folder, **options)
    sentence = str(caught.value)
    assert sentence.startswith("`pretrained_adaptation_name_or_path` ") and sentence.endswith(".")
    assert "\n" not in sentence and len(sentence) < 700
    before.assert_unchanged()


class TestRefused:
    def test_another_base(self, saved):
        refused(adapted_to("gear", pipe=quick_pipeline(seed=1)), saved, "was made for the base .* other weights")

    def test_a_base_that_was_fully_fine_tuned(self, saved, pipe):
        pipe.learn({"gear": pictures("gear")}, learned("gear", method="full"), calibrate=False)
        refused(pipe, saved, "was made for the base .* other weights")

    def test_another_resolution(self, saved):
        pipe = adapted_to("gear", pipe=quick_pipeline(resolution=32))
        refused(pipe, saved, "made for pictures of 64 pixels, and this pipeline inspects at 32", runs=False)

    def test_registered_categories(self, saved, pipe):
        pipe.add_category("ring", pictures("ring"))
        refused(pipe, saved, "brings 'ring', which this pipeline knows already; give `overwrite=True`")
        pipe.load_adaptation(saved, overwrite=True)
        assert pipe.config.categories["ring"]["adaptation"] == "nut, ring"

    def test_overwriting_another_adaptation(self, source, saved):
        pipe = adapted_to("ring", "gear")
        gear = inspected(pipe, "gear", "gear")
        pipe.load_adaptation(saved, overwrite=True)
        assert pipe.adaptations == pipe.adapters.names == ["gear", "nut, ring"]
        assert torch.equal(inspected(pipe, "ring", "ring"), inspected(source, "ring", "ring"))
        assert torch.equal(inspected(pipe, "gear", "gear"), gear)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_name_that_others_rest_on(self, saved, pipe, overwrite):
        pipe.learn({"gear": pictures("gear")}, learned("gear"), name="nut, ring", calibrate=False)
        refused(pipe, saved, "an adaptation 'nut, ring', and on one of that name 'gear' rest", overwrite=overwrite)

    @pytest.mark.parametrize("missing", [FACTS, WEIGHTS])
    def test_a_missing_file(self, folder, victim, missing):
        (folder / missing).unlink()
        refused(victim, folder, f"must hold a complete {FACTS} and {WEIGHTS}", runs=False)

    @pytest.mark.parametrize("name", [FACTS, WEIGHTS])
    @pytest.mark.parametrize("share", [0, 0.5, 0.999])
    def test_a_file_that_was_cut_short(self, folder, victim, name, share):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole.rstrip()[: int(share * len(whole))])
        refused(victim, folder, f"must hold a complete {FACTS} and {WEIGHTS}", runs=False)

    @pytest.mark.parametrize("text", [b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b"1" * 5000, b'"format"', b"{}"])
    def test_a_file_that_is_something_else(self, folder, victim, text):
        (folder / FACTS).write_bytes(text)
        refused(victim, folder, f"must hold a complete {FACTS} and {WEIGHTS}", runs=False)

    @pytest.mark.parametrize("name", [FACTS, WEIGHTS])
    def test_a_pipe_or_a_device_is_not_waited_for(self, folder, victim, name):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(victim, folder, "must hold a complete")
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        refused(victim, folder, "must hold a complete")

    def test_a_later_format(self, folder, pipe):
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        later = {"format": 99, "version": "9.0", "something": "else"}
        (folder / FACTS).write_text(json.dumps(later))
        refused(pipe, folder, r"was written by a later version \(9.0\); update the package")
        (folder / FACTS).write_text(json.dumps(facts))
        assert pipe.load_adaptation(folder) == ["nut", "ring"]

    @pytest.mark.parametrize("number", [1, 2])
    def test_formats_before(self, folder, pipe, number):
        """They noted no pictures; the second noted what nothing looks at now."""
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        for record in facts["categories"].values():
            del record["digests"]
            if number == 2:
                record["adapted"] = True
        (folder / FACTS).write_text(json.dumps(facts | {"format": number}))
        assert pipe.load_adaptation(folder) == ["nut", "ring"]
        assert "adapted" not in pipe.config.categories["nut"]
        with pytest.raises(ValueError, match="'nut' was registered by an earlier version"):
            pipe.calibrate("nut", pictures("nut"))

    def test_a_pipeline(self, tiny_pipeline_folder, victim):
        refused(victim, tiny_pipeline_folder, f"must hold a complete {FACTS}")

    @pytest.mark.parametrize("name", ["somebody/never-written", "no/such/folder", "", "../x", "a b"])
    def test_what_cannot_be_reached(self, victim, name, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        refused(victim, name, "must be a folder or a Hub id that can be reached", runs=False, cache_dir=tmp_path)


def put(path, value):
    """An edit of the facts: `value` (if callable, of the present one) at a path of keys; `...` deletes."""

    def edit(facts, tensors):
        *parents, last = path
        for key in parents:
            facts = facts[key]
        if value is ...:
            del facts[last]
        else:
            facts[last] = value(facts[last]) if callable(value) else value

    return edit


def rename_category(name):
    def edit(facts, tensors):
        for key in ("categories", "prompts"):
            facts[key] = {name if category == "nut" else category: value for category, value in facts[key].items()}

    return edit


def tensor(name, change):
    """An edit of the weights: the changed tensor, or None to delete it."""

    def edit(facts, tensors):
        value = change(tensors.get(name))
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value.contiguous()

    return edit


CALIBRATION = ("categories", "nut", "calibration")
QUERY = "denoiser.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FACT_EDITS = {
    "format": put(["format"], "1"),
    "format NaN": put(["format"], float("nan")),
    "adaptation path": put(["categories", "nut", "adaptation"], "../x"),
    "adaptation number": put(["categories", "nut", "adaptation"], 5),
    "shots 1e12": put(["categories", "nut", "shots"], 10**12),
    "rotations 1e12": put(["categories", "nut", "rotations"], 10**12),
    "noise strength true": put(["categories", "nut", "noise_strength"], True),
    "threshold 1e-320": put((*CALIBRATION, "threshold"), 1e-320),
    "scores of a million": put((*CALIBRATION, "scores"), [1.0] * 10**6),
    "pictures 1e12": put((*CALIBRATION, "pictures"), 10**12),
    "inspection steps 1e9": put((*CALIBRATION, "settings", "num_inference_steps"), 10**9),
    "inspection scales": put((*CALIBRATION, "settings", "mask_scales"), [10**6]),
    "training steps 1e12": put(["record", "settings", "steps"], 10**12),
    "training rank": put(["record", "settings", "rank"], True),
    "training augmentation": put(["record", "settings", "augmentation"], {"scale": 5}),
    "training with more": put(["record", "settings", "more"], 1),
    "version number": put(["version"], 5),
    "prompts of half a character": put(["prompts", "nut", "fine"], ["a nut \ud800"]),
    "a million prompts": put(["prompts", "nut", "fine"], ["a nut"] * 10**6),
    "extra key": put(["command"], "rm"),
    "no version": put(["version"], ...),
    "name of another type": put(["name"], ["nut"]),
    "huge name": put(["name"], "x" * 10**6),
    "name with a line break": put(["name"], "a\nb"),
    "name that is a path": put(["name"], "../x"),
    "fingerprint list": put(["base_fingerprint"], [1, 2]),
    "fingerprint texts": put(["base_fingerprint", "unet"], lambda marks: list(map(str, marks))),
    "resolution text": put(["resolution"], "x" * 10**6),
    "resolution list": put(["resolution"], [64]),
    "huge base": put(["base_model"], "x" * 10**6),
    "record list": put(["record"], []),
    "record with more": put(["record", "more"], 1),
    "settings text": put(["record", "settings"], "all"),
    "categories list": put(["categories"], ["nut", "ring"]),
    "categories null": put(["categories"], None),
    "no categories": lambda facts, tensors: facts.update(categories={}, prompts={}),
    "one category too many": put(["categories", "more"], {}),
    "category path": rename_category("../x"),
    "category dots": rename_category(".."),
    "huge category": rename_category("x" * 10**6),
    "blank category": rename_category(" "),
    "category record list": put(["categories", "nut"], [1]),
    "category record with more": put(["categories", "nut", "more"], 1),
    "category record with less": put(["categories", "nut", "shots"], ...),
    "prompt design": put(["categories", "nut", "prompt_design"], "poetic"),
    "digests text": put(["categories", "nut", "digests"], "yes"),
    "digests of numbers": put(["categories", "nut", "digests"], [1]),
    "prompt design list": put(["categories", "nut", "prompt_design"], ["simple"]),
    "shots text": put(["categories", "nut", "shots"], "2"),
    "rotations zero": put(["categories", "nut", "rotations"], 0),
    "noise strength text": put(["categories", "nut", "noise_strength"], "0.4"),
    "noise strength 2": put(["categories", "nut", "noise_strength"], 2.0),
    "calibration list": put(CALIBRATION, [0.3]),
    "calibration with more": put((*CALIBRATION, "more"), 1),
    "threshold text": put((*CALIBRATION, "threshold"), "0.3"),
    "threshold NaN": put((*CALIBRATION, "threshold"), float("nan")),
    "threshold zero": put((*CALIBRATION, "threshold"), 0.0),
    "scores text": put((*CALIBRATION, "scores"), "many"),
    "scores NaN": put((*CALIBRATION, "scores"), [float("nan")]),
    "rate text": put((*CALIBRATION, "false_alarm_rate"), "low"),
    "rate 2": put((*CALIBRATION, "false_alarm_rate"), 2.0),
    "pictures text": put((*CALIBRATION, "pictures"), "2"),
    "inspection settings list": put((*CALIBRATION, "settings"), []),
    "inspection settings with more": put((*CALIBRATION, "settings", "more"), 1),
    "inspection steps text": put((*CALIBRATION, "settings", "num_inference_steps"), "5"),
    "prompts list": put(["prompts"], []),
    "prompts of others": put(["prompts", "gear"], {"coarse": ["a gear"], "fine": []}),
    "prompts null": put(["prompts", "nut"], None),
    "prompts numbers": put(["prompts", "nut", "coarse"], [1]),
    "prompts empty": put(["prompts", "nut"], {"coarse": [], "fine": []}),
    "prompts with more": put(["prompts", "nut", "more"], []),
    "huge prompt": put(["prompts", "nut", "fine"], ["x" * 10**6]),
}
WEIGHT_EDITS = {
    "no bank": tensor("bank.1", lambda bank: None),
    "a bank too many": tensor("bank.2", lambda _: torch.ones(1, 3)),
    "bank of another width": tensor("bank.0", lambda bank: bank[:, 1:]),
    "bank of no rows": tensor("bank.0", lambda bank: bank[:0]),
    "bank of another rank": tensor("bank.0", lambda bank: bank[0]),
    "bank of NaN": tensor("bank.0", lambda bank: bank * torch.nan),
    "bank of 8 bits": tensor("bank.0", lambda bank: bank.to(torch.float8_e4m3fn)),
    "bank whose squares overflow": tensor("bank.0", lambda bank: bank * 1e30),
    "sources of another type": tensor("sources.0", lambda sources: sources.bool()),
    "bank of integers": tensor("bank.0", lambda bank: bank.int()),
    "weights of another width": tensor(f"{QUERY}.lora_A.weight", lambda weight: weight[:, 1:]),
    "weights of another rank": tensor(f"{QUERY}.lora_B.weight", lambda weight: weight[:, :1]),
    "weights of NaN": tensor(f"{QUERY}.lora_A.weight", lambda weight: weight * torch.nan),
    "weights of 8 bits": tensor(f"{QUERY}.lora_A.weight", lambda weight: weight.to(torch.float8_e5m2)),
    "weights that overflow": lambda facts, tensors: tensors.update(
        {name: torch.full_like(tensors[name], 6e4) for name in (f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight")}
    ),
    "half a pair": tensor(f"{QUERY}.lora_A.weight", lambda weight: None),
    "weights of the base": tensor("denoiser.conv_in.weight", lambda _: torch.zeros(16, 9, 3, 3)),
    "weights of the decoder's base": tensor("decoder.decoder.conv_in.weight", lambda _: torch.zeros(16, 4, 3, 3)),
    "a layer that is not there": tensor("denoiser.x.lora_A.weight", lambda _: torch.zeros(2, 4)),
    "a part that is not there": tensor("encoder.x.lora_A.weight", lambda _: torch.zeros(2, 4)),
    "an alpha": tensor(f"{QUERY}.alpha", lambda _: torch.tensor(1000.0)),
    "no LoRA": lambda facts, tensors: [tensors.pop(name) for name in list(tensors) if "lora" in name],
}


@pytest.fixture(scope="module")
def victim():
    return adapted_to("gear")


@pytest.fixture(scope="module")
def original(saved):
    return json.loads((saved / FACTS).read_text(encoding="utf-8")), load_file(saved / WEIGHTS)


class TestMalicious:
    def test_unchanged_it_loads(self, original, pipe, tmp_path):
        (tmp_path / FACTS).write_text(json.dumps(original[0]), encoding="utf-8")
        save_file(original[1], tmp_path / WEIGHTS)
        assert pipe.load_adaptation(tmp_path) == ["nut", "ring"]

    @pytest.mark.parametrize("edit", [*FACT_EDITS, *WEIGHT_EDITS])
    def test_is_refused(self, victim, original, tmp_path, edit):
        facts, tensors = copy.deepcopy(original[0]), dict(original[1])
        (FACT_EDITS | WEIGHT_EDITS)[edit](facts, tensors)
        (tmp_path / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        save_file(tensors, tmp_path / WEIGHTS)
        refused(victim, tmp_path, "must hold a complete|was made for the base", runs=False)
