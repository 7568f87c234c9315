"""Parts as files, and adaptations as zips: taken home and back, and brought by strangers."""

import json
import pickle
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from anomalysd_pipeline.app import downloads
from anomalysd_pipeline.app.limits import Limits
from anomalysd_pipeline.app.sessions import SessionStore
from anomalysd_pipeline.inspection.result import load_part, register, save_part

from .tiny_adaptations import adapted_to, inspected, learned, pictures, quick_pipeline


@pytest.fixture(scope="module")
def taken_home(tmp_path_factory):
    """An adaptation to nuts as its zip, and the map that its pipeline computes."""
    pipe = adapted_to("nut")
    folder = tmp_path_factory.mktemp("home")
    pipe.save_adaptation(folder / "nut")
    with zipfile.ZipFile(folder / "nut.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((folder / "nut").iterdir()):
            archive.write(file, file.name)
    return folder / "nut.zip", inspected(pipe, "nut")


@pytest.fixture(scope="module")
def base():
    return quick_pipeline()


@pytest.fixture
def session(tmp_path, base):
    """One that must stay as it is: its pipeline is that of many tests."""
    store = SessionStore(Limits(parts=2), lambda: base, tmp_path / "sessions")
    yield store.get(None)


@pytest.fixture
def own_session(tmp_path):
    """One with a pipeline of its own."""
    store = SessionStore(Limits(parts=2), quick_pipeline, tmp_path / "sessions")
    yield store.get(None)


def changed(taken_home, path, **files):
    """The zip with other files; None leaves one out. A double underscore in a name stands for a dot."""
    with zipfile.ZipFile(taken_home[0]) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents |= {name.replace("__", "."): content for name, content in files.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            if content is not None:
                archive.writestr(name, content)
    return path


def with_facts(taken_home, path, change):
    """The zip with `adaptation.json` changed by a function."""
    with zipfile.ZipFile(taken_home[0]) as archive:
        facts = json.loads(archive.read("adaptation.json"))
    change(facts)
    return changed(taken_home, path, adaptation__json=json.dumps(facts))


def refused(session, path, name="mine.zip") -> str:
    """The sentence of a refusal, after which the session must be as it was."""
    with pytest.raises(ValueError) as error:
        downloads.load_part_file(session, path, name)
    sentence = str(error.value)
    assert f"'{name}" in sentence and str(path.parent) not in sentence and str(session.folder) not in sentence
    assert "pretrained_adaptation" not in sentence
    assert session.parts == {} and session.pipe.categories == [] and session.pipe.adaptations == []
    assert list(session.folder.iterdir()) == []
    return sentence


class TestAdaptations:
    def test_come_back_as_they_were(self, taken_home, own_session):
        path, expected = taken_home
        assert downloads.load_part_file(own_session, path) == ["nut"]
        part = own_session.parts["nut"]
        assert part.taught and part.pictures == [] and part.facts == {"shots": 2, "file": "nut.zip"}
        assert part.prompts == own_session.pipe.prompt_book.to_dict()["categories"]["nut"]
        # The weights are stored in half precision, and so learned; nothing is lost on the way.
        assert torch.equal(inspected(own_session.pipe, "nut"), expected)
        assert list(own_session.folder.iterdir()) == []

    def test_packed_again_with_its_folder(self, taken_home, own_session, tmp_path):
        with zipfile.ZipFile(taken_home[0]) as archive, zipfile.ZipFile(tmp_path / "b.zip", "w") as again:
            again.writestr("nut/", b"")
            for name in archive.namelist():
                again.writestr(f"nut/{name}", archive.read(name))
                again.writestr(f"__MACOSX/nut/._{name}", b"x")
            again.writestr("nut/README.md", b"# Nut")
        assert downloads.load_part_file(own_session, tmp_path / "b.zip") == ["nut"]

    def test_twice_only_on_request(self, taken_home, own_session):
        downloads.load_part_file(own_session, taken_home[0])
        with pytest.raises(ValueError, match="'nut.zip' brings 'nut', which this pipeline knows already"):
            downloads.load_part_file(own_session, taken_home[0])
        assert downloads.load_part_file(own_session, taken_home[0], overwrite=True) == ["nut"]

    def test_too_many_parts(self, taken_home, session, tmp_path):
        def more(facts):
            for name in ("a", "b"):
                facts["categories"][name] = facts["categories"]["nut"]
                facts["prompts"][name] = facts["prompts"]["nut"]

        with zipfile.ZipFile(taken_home[0]) as archive:
            tensors = load(archive.read("adaptation.safetensors"))
        tensors |= {
            f"{kind}.{index}": tensors[f"{kind}.0"].clone() for kind in ("bank", "sources") for index in (1, 2)
        }
        path = with_facts(taken_home, tmp_path / "x.zip", more)
        with zipfile.ZipFile(path) as archive:
            facts = archive.read("adaptation.json")
        path = changed(taken_home, path, adaptation__json=facts, adaptation__safetensors=save(tensors))
        assert "brings 3 parts, which would make 3, and a session has room for 2" in refused(session, path)


class TestPartFiles:
    """One format for what the page and `anomalysd detect` have learned, with a fine-tuning or without."""

    @pytest.fixture(scope="class")
    def registered(self):
        pipe = quick_pipeline()
        register(pipe, "nut", pictures("nut"))
        return pipe

    def test_a_fine_tuned_part(self, tmp_path, own_session):
        pipe = adapted_to("nut")
        path = downloads.part_file(pipe, "nut", tmp_path / "nut.safetensors")
        assert downloads.load_part_file(own_session, path) == ["nut"] and own_session.parts["nut"].taught
        assert torch.equal(inspected(own_session.pipe, "nut"), inspected(pipe, "nut"))

    def test_a_part_without_a_fine_tuning_is_all_there(self, registered, tmp_path, own_session):
        path = downloads.part_file(registered, "nut", tmp_path / "nut.safetensors")
        assert downloads.load_part_file(own_session, path) == ["nut"] and not own_session.parts["nut"].taught
        pipe = own_session.pipe
        assert pipe.config.categories == registered.config.categories and pipe.adaptations == []
        assert torch.equal(inspected(pipe, "nut"), inspected(registered, "nut"))

    def test_that_of_detect_is_taken_by_the_app_and_the_other_way_round(self, registered, tmp_path, own_session):
        save_part(registered, "nut", tmp_path / "part.safetensors")
        assert downloads.load_part_file(own_session, tmp_path / "part.safetensors") == ["nut"]
        path, other = downloads.part_file(own_session.pipe, "nut", tmp_path / "home.safetensors"), quick_pipeline()
        load_part(other, "nut", path)
        assert other.config.categories == registered.config.categories
        assert quick_pipeline().load_adaptation(path) == ["nut"]

    def test_an_unknown_one_cannot_be_taken_home(self, base, tmp_path):
        with pytest.raises(ValueError, match="`adaptation` must be one of"):
            downloads.part_file(base, "gear", tmp_path / "x.safetensors")
        assert not list(tmp_path.glob("*.safetensors"))

    def test_it_replaces_a_fine_tuned_one(self, registered, tmp_path, own_session):
        own_session.pipe.learn({"nut": pictures("nut")}, learned("nut"), calibrate=False)
        path = downloads.part_file(registered, "nut", tmp_path / "nut.safetensors")
        assert downloads.load_part_file(own_session, path, overwrite=True) == ["nut"]
        assert own_session.pipe.adaptations == [] and own_session.pipe.categories == ["nut"]

    @pytest.mark.parametrize("change", ["cut", "picture", "old", "mixed"])
    def test_a_damaged_one(self, change, registered, tmp_path, session):
        path = downloads.part_file(registered, "nut", tmp_path / "nut.safetensors")
        tensors = load(path.read_bytes())
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["adaptation"])
        content = {
            "cut": path.read_bytes()[:-9],
            "picture": b"\x89PNG\r\n" + bytes(99),
            "old": save(tensors, {"record": "{}"}),
            "mixed": save(tensors, {"adaptation": json.dumps({**facts, "record": {"settings": {"steps": 3}}})}),
        }[change]
        path.write_bytes(content)
        assert "must hold what was learned of a part, as it was downloaded here" in refused(session, path, "mine")


class TestHostileAdaptations:
    @pytest.mark.parametrize(
        "files",
        [
            {"evil__pkl": pickle.dumps({"a": 1})},
            {"model_index__json": "{}"},
            {"../adaptation__json": "{}"},
            {"/etc/passwd": "x"},
            {"a/b/adaptation__json": "{}"},
            {"other/adaptation__json": "{}"},
            {"C:\\adaptation__json": "x"},
        ],
        ids=["pickle", "pipeline", "parent", "absolute", "deep", "second", "drive"],
    )
    def test_other_files(self, taken_home, session, tmp_path, files):
        refused(session, changed(taken_home, tmp_path / "x.zip", **files))
        assert not (tmp_path / "adaptation.json").exists()

    @pytest.mark.parametrize("name", ["adaptation__json", "adaptation__safetensors"])
    def test_a_missing_file(self, taken_home, session, tmp_path, name):
        assert "must hold adaptation.json" in refused(session, changed(taken_home, tmp_path / "x.zip", **{name: None}))

    @pytest.mark.parametrize(
        "content", [pickle.dumps({"a": torch.zeros(2)}), b"", b"\xff" * 64, (2**60).to_bytes(8, "little") + b"{}"]
    )
    def test_weights_that_are_none(self, taken_home, session, tmp_path, content):
        refused(session, changed(taken_home, tmp_path / "x.zip", adaptation__safetensors=content))

    @pytest.mark.parametrize(
        "content", ["", "null", "[]", "{}", "[" * 100_000, "NaN", '{"format": 1e999}', b"\xff\xfe"]
    )
    def test_facts_that_are_none(self, taken_home, session, tmp_path, content):
        refused(session, changed(taken_home, tmp_path / "x.zip", adaptation__json=content))

    def test_bombs(self, taken_home, session, tmp_path):
        long = refused(session, changed(taken_home, tmp_path / "x.zip", adaptation__json=b" " * 2_000_000))
        assert "larger than 1 MB" in long
        zeros = changed(taken_home, tmp_path / "y.zip", adaptation__safetensors=bytes(101_000_000))
        assert "larger than 100 MB" in refused(session, zeros)

    @pytest.mark.parametrize("prompts", [{"coarse": ["a"] * 9}, [["fine", ["a"] * 500]]])
    def test_more_prompts_than_a_visitor_may_write(self, taken_home, session, tmp_path, prompts):
        path = with_facts(taken_home, tmp_path / "x.zip", lambda facts: facts["prompts"].update(nut=prompts))
        assert "more than 8 prompts" in refused(session, path)

    @pytest.mark.parametrize(
        "change", [{"num_inference_steps": 1000}, {"mask_scales": [64]}, {"mask_scales": list(range(1, 10))}]
    )
    def test_settings_that_would_take_hours(self, taken_home, session, tmp_path, change):
        settings = {**quick_pipeline().settings().to_dict(), **change}
        record = {
            "threshold": 1.0,
            "scores": [0.5, 0.6],
            "false_alarm_rate": 0.05,
            "pictures": 2,
            "held_out": True,
            "settings": settings,
        }

        def slow(facts):
            facts["categories"]["nut"]["calibration"] = record

        path = with_facts(taken_home, tmp_path / "x.zip", slow)
        assert "settings that take too long" in refused(session, path)

    def test_another_base(self, taken_home, session, tmp_path):
        def other(facts):
            facts["base_fingerprint"]["unet"][0] += 1

        assert "was made for the base" in refused(session, with_facts(taken_home, tmp_path / "x.zip", other))

    @pytest.mark.parametrize("name", ["../x", "a/b", "<b>\0", "x" * 65, ""])
    def test_names(self, taken_home, session, tmp_path, name):
        def rename(facts):
            for key in ("categories", "prompts"):
                facts[key] = {name: facts[key]["nut"]}

        refused(session, with_facts(taken_home, tmp_path / "x.zip", rename))

    def test_no_zip_at_all(self, session, tmp_path):
        (tmp_path / "x.bin").write_bytes(b"\x80\x04\x95")
        with pytest.raises(ValueError, match="'x' must hold what was learned of a part"):
            downloads.load_part_file(session, tmp_path / "x.bin", "x")
        assert "not there anymore" in refused(session, tmp_path / "none.zip")
        (tmp_path / "big.zip").write_bytes(bytes(20_000_001))
        assert "larger than 20 MB" in refused(session, tmp_path / "big.zip")

    def test_no_room(self, taken_home, tmp_path, base):
        session = SessionStore(Limits(disk_bytes=1000), lambda: base, tmp_path / "sessions").get(None)
        with pytest.raises(ValueError, match="do not fit"):
            downloads.load_part_file(session, taken_home[0])
        assert session.pipe.categories == []

    def test_an_ended_session(self, taken_home, tmp_path, base):
        store = SessionStore(Limits(), lambda: base, tmp_path / "sessions")
        session = store.get(None)
        store.drop(session.key)
        with pytest.raises(ValueError, match="session has ended"):
            downloads.load_part_file(session, taken_home[0])
