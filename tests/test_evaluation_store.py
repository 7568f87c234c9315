"""The folder of an evaluation: what counts as done, whose folder it is, and what is removed."""

import json
import os

import numpy as np
import pytest

from anomalysd_pipeline.evaluation.store import Draw, Store

FACTS = {
    "system": {"name": "anomalysd", "noise_strength": 0.4},
    "dataset": {"name": "parts", "categories": {"nut": {"normal": 2}}, "test_pictures": "ab"},
    "protocol": {"shots": [1], "seeds": [0], "drawn_pictures": "cd", "resolution": 256},
}
DRAW = Draw(1, 0)


def row(index, **given):
    return {"shots": 1, "seed": 0, "category": "nut", "number": 0, "index": index, "score": index / 4, **given}


def changed(part, **values):
    return {**FACTS, part: {**FACTS[part], **values}}


@pytest.fixture
def store(tmp_path):
    found = Store(tmp_path / "out")
    found.claim()
    found.begin(FACTS)
    return found


class TestRows:
    def test_those_of_all_processes_in_order(self, store):
        other = Store(store.folder)
        for index, one in ((3, store), (0, other), (2, other), (1, store)):
            one.add(row(index), np.full((2, 3), index, np.float32))
        other.add(row(0, seed=5), np.zeros((1, 1), np.float32))
        assert [key[3] for key in store.rows(DRAW)] == [0, 1, 2, 3]
        assert list(store.rows()) == [(1, 0, 0, 0), (1, 0, 0, 1), (1, 0, 0, 2), (1, 0, 0, 3), (1, 5, 0, 0)]
        assert store.rows()[1, 0, 0, 2] == row(2)
        found = np.load(store.map_path(DRAW, 0, 3))
        assert found.dtype == np.float32 and found.tolist() == [[3, 3, 3]] * 2

    @pytest.mark.parametrize(
        "torn", [b'{"shots": 1, "se', b"5\n", b'{"shots": 1}\n', b"\x00\x00\x00", b"\xff\xfe{", b""]
    )
    def test_a_torn_last_line_is_not_done(self, store, torn):
        store.add(row(0), np.zeros((1, 1), np.float32))
        (path,) = (store.folder / "rows").iterdir()
        with open(path, "ab") as file:
            file.write(torn)
        later = Store(store.folder)
        later.add(row(1), np.zeros((1, 1), np.float32))
        assert [key[3] for key in later.rows(DRAW)] == [0, 1]

    def test_a_torn_line_of_costs_is_left_out(self, store):
        store.add_costs({"seconds": 1})
        (path,) = (store.folder / "costs").iterdir()
        path.write_text(path.read_text() + '{"seco')
        Store(store.folder).add_costs({"seconds": 2})
        assert sorted(cost["seconds"] for cost in store.costs()) == [1, 2]

    def test_a_row_comes_after_its_map(self, store, monkeypatch):
        def full(*paths):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(ValueError, match="`--out` '.*' could not be written .No space.*same command to go on"):
            store.add(row(0), np.zeros((1, 1), np.float32))
        assert not store.rows() and not store.map_path(DRAW, 0, 0).exists()


class TestFacts:
    def test_the_same_go_on(self, store):
        store.check_facts(json.loads(json.dumps(FACTS)))
        Store(store.folder).claim()
        assert store.is_begun()

    @pytest.mark.parametrize(
        ("facts", "sentence"),
        [
            (changed("protocol", shots=[1, 2]), r"with --shots = \[1\], but \[1, 2\] is asked for now; give the same"),
            (changed("protocol", resolution="original"), "with --map_resolution = 256, but 'original' is asked"),
            (changed("system", name="padim"), "with --peer = 'anomalysd', but 'padim'"),
            (changed("system", noise_strength=0.5), "with system.noise_strength = 0.4, but 0.5"),
            (changed("system", preset="paper"), "with system.preset = None, but 'paper'"),
            (changed("dataset", categories={"ring": {"normal": 2}}), r"--categories = \['nut'\], but \['ring'\]"),
            (changed("dataset", categories={"nut": {"normal": 1}}), "dataset.categories.nut.normal = 2, but 1"),
            (changed("dataset", test_pictures="xy"), "with other test pictures than are asked for now"),
            (changed("protocol", drawn_pictures="xy"), "with other normal pictures to learn from than"),
        ],
    )
    def test_others_are_refused_by_the_difference(self, store, facts, sentence):
        with pytest.raises(ValueError, match=sentence) as caught:
            store.check_facts(facts)
        assert "--overwrite to start anew" in str(caught.value) and "\n" not in str(caught.value)

    def test_there_are_none_yet(self, tmp_path):
        store = Store(tmp_path)
        store.check_facts(FACTS)
        assert not store.is_begun() and not any(tmp_path.iterdir())


class TestWhoseFolderItIs:
    @pytest.mark.parametrize("name", ["report.md", "figures", "pictures", "rows", "maps", "summary.json"])
    def test_what_another_wrote_is_not_touched(self, tmp_path, name):
        path = tmp_path / name
        if "." in name:
            path.write_text("mine")
        else:
            path.mkdir()
        with pytest.raises(ValueError, match=f"holds '{name}' of something else.*new or empty folder"):
            Store(tmp_path).claim()
        assert [path.name for path in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize("text", ['{"facts": {}, "given": {}}', "[1]", "{", "\x00"])
    def test_a_run_of_something_else(self, tmp_path, text):
        """Such as that of `anomalysd_pipeline.train` or `detect`."""
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match="holds 'run.json' of something else"):
            Store(tmp_path).claim()
        assert (tmp_path / "run.json").read_text() == text

    def test_a_file(self, tmp_path):
        (tmp_path / "out").write_text("")
        with pytest.raises(ValueError, match="`--out` '.*out' is a file; give a folder."):
            Store(tmp_path / "out").claim()

    def test_below_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="`--out` '.*' could not be written"):
            Store(tmp_path / "file" / "out").claim()

    def test_other_things_may_be_there(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        Store(tmp_path).claim()
        assert (tmp_path / "notes.txt").read_text() == "mine"


class TestDiscard:
    @pytest.fixture
    def full(self, store):
        """An evaluation that is complete, and what a person has put beside it."""
        store.add(row(0), np.zeros((1, 1), np.float32))
        store.add_costs({})
        for name in ("summary.json", "shots.json", "classes/k1-s0/0.json"):
            store.write_json(name, {})
        for name in ("report.md", "results.csv", "results.parquet", "figures/curves_1-shot.png", "figures/cases.png"):
            (store.folder / name).parent.mkdir(exist_ok=True)
            (store.folder / name).write_text("ours")
        for name in ("notes.txt", "figures/mine.png", "pictures/nut/test/good/000.png"):
            (store.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (store.folder / name).write_text("mine")
        return store

    def test_only_what_an_evaluation_wrote(self, full):
        full.discard()
        left = {path.relative_to(full.folder).as_posix() for path in full.folder.rglob("*") if path.is_file()}
        assert left == {"run.json", "notes.txt", "figures/mine.png", "pictures/nut/test/good/000.png"}
        assert not full.is_begun() and not full.rows() and not full.costs()

    def test_killed_halfway_it_is_no_evaluation_but_ours(self, full):
        full.write_json("run.json", {"evaluation": None})  # the first that `discard` does
        later = Store(full.folder)
        later.claim()
        later.check_facts(changed("system", name="padim"))
        assert not later.is_begun()

    def test_tidying_leaves_what_is_whole(self, full):
        whole = {path for path in full.folder.rglob("*") if path.is_file()}
        for name in (".run.json.ab12", "maps/k1-s0/0/.cd34", "classes/k1-s0/.0.json.ef56", ".report.md.partial"):
            (full.folder / name).write_text("")
        (full.folder / ".mine").write_text("")
        for name in ("pictures/.ab12/ring", "maps/.ab12/0", "prepared/.ab12"):
            (full.folder / name).mkdir(parents=True)
        full.tidy()
        assert {path for path in full.folder.rglob("*") if path.is_file()} == {*whole, full.folder / ".mine"}
        assert not list(full.folder.rglob(".ab12")) and not (full.folder / "prepared").exists()

    def test_clearing_a_draw(self, full):
        full.add(row(0, seed=1), np.zeros((1, 1), np.float32))
        (full.prepared(DRAW) / "banks").mkdir(parents=True)
        full.clear(DRAW, maps=False)
        assert full.map_path(DRAW, 0, 0).exists() and not full.prepared(DRAW).exists()
        full.clear(DRAW, maps=True)
        assert not full.map_path(DRAW, 0, 0).exists() and full.map_path(Draw(1, 1), 0, 0).exists()
