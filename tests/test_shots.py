"""Few-shot draws, and the file that keeps them."""

import json

import pytest
from PIL import Image

from anomalysd_pipeline.data.datasets import Category, draw_all, draw_shots, read_dataset, read_shots, write_shots


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 12), "gray").save(root / name)


class TestDrawShots:
    names = [f"{index:03d}.png" for index in range(10)]

    def test_depends_on_names_and_seed_alone(self):
        drawn = draw_shots(self.names, 4, seed=1)
        assert drawn == draw_shots(self.names[::-1], 4, seed=1)
        assert len(set(drawn)) == 4 and {str(path) for path in drawn} <= set(self.names)
        assert draw_shots(self.names, 2, seed=1) == drawn[:2]
        assert len({tuple(draw_shots(self.names, 4, seed)) for seed in range(5)}) > 1
        assert draw_shots(self.names, 0, seed=1) == []

    @pytest.mark.parametrize(("shots", "seed", "name"), [(11, 0, "shots"), (-1, 0, "shots"), (1, -1, "seed")])
    def test_bad_shots(self, shots, seed, name):
        with pytest.raises(ValueError, match=f"`{name}`"):
            draw_shots(self.names, shots, seed)


class TestShotsOnPaper:
    @pytest.fixture
    def root(self, tmp_path):
        for name, count in (("nut", 5), ("grüne Schraube", 3)):
            write(tmp_path / "data" / name, *(f"train/good/{index}.png" for index in range(count)), "test/good/0.png")
        return tmp_path / "data"

    def test_draw_all(self, root):
        categories = read_dataset(root)
        drawn = draw_all(categories, [0, 1, 3], [0, 7])
        assert list(drawn) == [0, 1, 3] and all(list(by_seed) == [0, 7] for by_seed in drawn.values())
        for count, by_seed in drawn.items():
            for seed, chosen in by_seed.items():
                assert chosen == {name: draw_shots(c.train, count, seed) for name, c in categories.items()}
        with pytest.raises(ValueError, match="`shots` is 4, but 'grüne Schraube' has only 3"):
            draw_all(categories, [1, 4], [0])

    def test_there_and_back(self, root, tmp_path):
        categories = read_dataset(root)
        drawn = draw_all(categories, [0, 2], [0, 1])
        path = tmp_path / "new" / "shots.json"
        write_shots(path, drawn, root)
        assert [entry.name for entry in path.parent.iterdir()] == ["shots.json"]
        table = json.loads(path.read_text())
        assert table["2"]["1"]["nut"] == [f"nut/train/good/{p.name}" for p in drawn[2][1]["nut"]]
        assert read_shots(path, root, categories) == drawn
        # The data set may lie elsewhere, and fewer categories may be asked for.
        root.rename(tmp_path / "elsewhere")
        moved = read_dataset(tmp_path / "elsewhere", ["nut"])
        again = read_shots(str(path), str(tmp_path / "elsewhere"), moved)
        assert again == draw_all(moved, [0, 2], [0, 1])

    def test_not_written(self, root, tmp_path):
        with pytest.raises(ValueError, match="`shots` has a picture outside `root`"):
            write_shots(tmp_path / "shots.json", {1: {0: {"nut": [tmp_path / "a.png"]}}}, root)
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="`path`.*could not be written"):
            write_shots(tmp_path / "file" / "shots.json", {}, root)
        (tmp_path / "taken" / "shots.json").mkdir(parents=True)
        with pytest.raises(ValueError, match="`path`.*could not be written"):
            write_shots(tmp_path / "taken" / "shots.json", {}, root)
        assert [entry.name for entry in (tmp_path / "taken").iterdir()] == ["shots.json"]

    @pytest.mark.parametrize(
        ("table", "sentence"),
        [
            ("[1]", "has .1. where a number of shots should be"),
            ("{}", "where a number of shots should be"),
            ('{"one": {}}', "where a number of shots should be"),
            ('{"01": {"0": {}}}', "where a number of shots should be"),
            ('{"1": {}}', "where a seed should be"),
            ('{"1": ["nut/train/good/0.png"]}', "where a seed should be"),
            ('{"1": {"-1": {}}}', "where a seed should be"),
            ('{"1": {"0": {}}}', "1 shots, seed 0, 'nut': there is no list"),
            ('{"1": {"0": ["nut"]}}', "'nut': there is no list"),
            ('{"1": {"0": {"nut": "nut/train/good/0.png"}}}', "'nut': there is no list"),
            ('{"1": {"0": {"nut": [1]}}}', "'nut': there is no list"),
            ('{"2": {"0": {"nut": ["nut/train/good/0.png"]}}}', "1 different pictures; give 2"),
            ('{"2": {"0": {"nut": ["nut/train/good/0.png", "nut//train/good/0.png"]}}}', "1 different .* give 2"),
            ('{"1": {"0": {"nut": ["nut/train/good/9.png"]}}}', "'nut/train/good/9.png' is no file below"),
            ('{"1": {"0": {"nut": ["nut/train/good"]}}}', "is no file below"),
            ('{"1": {"0": {"nut": ["../outside.png"]}}}', "is no file below"),
            ('{"1": {"0": {"nut": ["nut/../../outside.png"]}}}', "is no file below"),
            ('{"1": {"0": {"nut": ["ABSOLUTE"]}}}', "is no file below"),
            ('{"1": {"0": {"nut": ["nut/test/good/0.png"]}}}', "is a test picture"),
            ("{", "cannot be read as JSON"),
        ],
    )
    def test_bad_files(self, root, tmp_path, table, sentence):
        write(tmp_path, "outside.png")
        path = tmp_path / "shots.json"
        path.write_text(table.replace("ABSOLUTE", (root / "nut/train/good/0.png").as_posix()))
        with pytest.raises(ValueError, match=f"`path` .*shots.json'.*{sentence}") as caught:
            read_shots(path, root, read_dataset(root, ["nut"]))
        assert "\n" not in str(caught.value)

    def test_no_file(self, root, tmp_path):
        with pytest.raises(ValueError, match="`path`.*shots.json' cannot be read"):
            read_shots(tmp_path / "shots.json", root, {"nut": Category("nut", [], [])})
