"""Data sets: every layout as small files, and masks of every kind. Draws: see test_shots.py."""

import argparse
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from anomalysd_pipeline import synthetic
from anomalysd_pipeline.data.datasets import TestImage, load_mask, read_dataset, read_folder, read_mvtec, read_visa
from anomalysd_pipeline.training import pictures as train_data
from anomalysd_pipeline.training.options import add_arguments


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 12), "gray").save(root / name)


def write_mask(path, values, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if palette:
        image.putpalette(palette)
    image.save(path)


def blocks(*marks):
    """A mask 12 x 20 of zeros with `(row, column, value)` filled 3 x 4 from there."""
    values = np.zeros((12, 20), np.uint8)
    for row, column, value in marks:
        values[row : row + 3, column : column + 4] = value
    return values


class TestMVTec:
    @pytest.fixture
    def root(self, tmp_path):
        write(tmp_path / "nut", "train/good/001.png", "train/good/000.png", "test/good/000.png",
              "test/scratch/000.png", "test/scratch/001.png", "ground_truth/scratch/000_mask.png")  # fmt: skip
        return tmp_path

    def test_layout(self, root):
        category, folder = read_mvtec(root, "nut"), root / "nut"
        assert category.name == "nut"
        assert category.train == [folder / "train/good/000.png", folder / "train/good/001.png"]
        assert category.test == [
            TestImage(folder / "test/good/000.png", False, "good", None),
            TestImage(folder / "test/scratch/000.png", True, "scratch", folder / "ground_truth/scratch/000_mask.png"),
            TestImage(folder / "test/scratch/001.png", True, "scratch", None),
        ]

    def test_missing_folders(self, root):
        with pytest.raises(ValueError, match="`root`.*'bolt'"):
            read_mvtec(root, "bolt")
        (root / "bolt/train").mkdir(parents=True)
        with pytest.raises(ValueError, match="`root`.*'bolt/train/good'"):
            read_mvtec(root, "bolt")

    def test_empty_folders(self, root):
        shutil.rmtree(root / "nut/test/good")
        shutil.rmtree(root / "nut/test/scratch")
        with pytest.raises(ValueError, match="`root`.*no pictures"):
            read_mvtec(root, "nut")

    def test_unlabeled_test_picture(self, root):
        write(root, "nut/test/stray.png")
        with pytest.raises(ValueError, match="stray.png"):
            read_mvtec(root, "nut")

    def test_masks_lie_at_the_same_place(self, root):
        write(root / "nut", "test/scratch/deep/000.png", "test/scratch/flat/000.png")
        write(root / "nut", "ground_truth/scratch/deep/000_mask.png")
        masks = {image.path: image.mask_path for image in read_mvtec(root, "nut").test}
        folder = root / "nut/test/scratch"
        assert masks[folder / "deep/000.png"] == root / "nut/ground_truth/scratch/deep/000_mask.png"
        assert masks[folder / "flat/000.png"] is None

    @pytest.mark.parametrize("name", ["000.png", "000_mask.bmp", "000.TIF", "000.PNG"])
    def test_other_names_of_masks(self, root, name):
        mask = root / "nut/ground_truth/scratch/000_mask.png"
        mask.rename(mask.with_name(name))
        image = read_mvtec(root, "nut").test[1]
        assert image.mask_path == mask.with_name(name) and not image.indexed

    def test_a_mask_by_its_full_name_goes_first(self, root):
        write(root, "nut/ground_truth/scratch/000.png")
        assert read_mvtec(root, "nut").test[1].mask_path.name == "000_mask.png"

    def test_several_masks_are_united(self, root):
        folder = root / "nut/ground_truth/scratch"
        write_mask(folder / "000_mask.png", blocks((0, 0, 255)))
        write_mask(folder / "000_mask_1.png", blocks((6, 10, 255)))
        write_mask(folder / "000_mask2.tif", blocks((8, 0, 1)))
        image = read_mvtec(root, "nut").test[1]
        assert len(image.mask_path) == 3 and not image.indexed
        assert np.array_equal(image.mask(), blocks((0, 0, 1), (6, 10, 1), (8, 0, 1)) == 1)

    @pytest.mark.parametrize("name", ["Good", "ok", "OK", "Normal"])
    def test_names_of_good_pictures(self, root, name):
        (root / "nut/test/good").rename(root / "nut/test" / name)
        image = read_mvtec(root, "nut").test[0]
        assert (image.path.parent.name, image.label, image.defect) == (name, False, "good")

    def test_a_folder_without_masks_is_none(self, root):
        (root / "nut/ground_truth/scratch/001").mkdir()
        assert read_mvtec(root, "nut").test[2].mask_path is None

    def test_a_folder_of_masks_is_united(self, root):
        # As in MVTec LOCO, where the gray value numbers the defects.
        write(root, "nut/test/logical/007.png")
        folder = root / "nut/ground_truth/logical/007"
        write_mask(folder / "000.png", blocks((0, 0, 255)))
        write_mask(folder / "001.png", blocks((1, 2, 90), (6, 10, 250)))
        image = read_mvtec(root, "nut").test[1]
        assert (image.defect, image.mask_path) == ("logical", folder)
        assert np.array_equal(image.mask(), blocks((0, 0, 1), (1, 2, 1), (6, 10, 1)) == 1)
        write_mask(folder / "002.png", np.zeros((12, 12)))
        with pytest.raises(ValueError, match="`path`.*different sizes"):
            image.mask()

    def test_drawn_parts_are_read_back(self, tmp_path):
        synthetic.write_dataset(tmp_path, ["ring", "wood"], train=3, good=2, defective=3, seed=5, size=64)
        found = read_dataset(tmp_path)
        assert list(found) == ["ring", "wood"]
        for family, category in found.items():
            samples = synthetic.test_samples(family, 2, 3, 5, 64)
            expected = sorted((s.defect or "good", s.mask.tobytes()) for s in samples)
            read = [(i.defect, (np.zeros((64, 64), bool) if i.mask() is None else i.mask()).tobytes())
                    for i in category.test]  # fmt: skip
            assert len(category.train) == 3 and sorted(read) == expected


class TestVisa:
    rows = [
        "object,split,label,image,mask",
        "pcb,train,normal,pcb/Data/Images/Normal/0001.JPG,",
        "pcb,train,normal,pcb/Data/Images/Normal/0000.JPG,",
        "candle,train,normal,candle/Data/Images/Normal/0836.JPG,",
        "candle,train,normal,candle/Data/Images/Normal/0002.JPG,",
        "candle,test,normal,candle/Data/Images/Normal/0005.JPG,",
        "candle,test,anomaly,candle/Data/Images/Anomaly/001.JPG,candle/Data/Masks/Anomaly/001.png",
        "candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png",
        "pcb,test,normal,pcb/Data/Images/Normal/0003.JPG,",
    ]

    @pytest.fixture
    def root(self, tmp_path):
        write(tmp_path, *(row.split(",")[3] for row in self.rows[1:]))
        write_mask(tmp_path / "candle/Data/Masks/Anomaly/000.png", blocks((0, 0, 1), (6, 10, 3)))
        self.table(tmp_path, self.rows)
        return tmp_path

    def table(self, root, rows):
        (root / "split_csv").mkdir(exist_ok=True)
        (root / "split_csv/1cls.csv").write_text("\r\n".join(rows) + "\r\n")

    def test_as_published(self, root):
        data = root / "candle/Data"
        category = read_visa(root, "candle")
        assert category.train == [data / "Images/Normal/0002.JPG", data / "Images/Normal/0836.JPG"]
        first, *others = category.test
        assert first == TestImage(
            data / "Images/Anomaly/000.JPG", True, "anomaly", data / "Masks/Anomaly/000.png", indexed=True
        )
        assert [(i.path.name, i.label, i.defect, i.mask_path) for i in others] == [
            ("001.JPG", True, "anomaly", None),
            ("0005.JPG", False, "good", None),
        ]
        assert np.array_equal(first.mask(), blocks((0, 0, 1), (6, 10, 1)) == 1)
        assert others[0].mask() is None

    def test_recognized(self, root):
        write(root, "other/train/good/000.png", "other/test/good/000.png")
        assert read_dataset(root) == {"candle": read_visa(root, "candle"), "pcb": read_visa(root, "pcb")}

    def test_converted(self, root, tmp_path_factory):
        # What VisA's own script makes of it: same names, masks of 0 and 255, which leave no doubt about their scale.
        out = tmp_path_factory.mktemp("converted")
        for row in self.rows[1:]:
            name, split, label, image, mask = row.split(",")
            kind = "good" if label == "normal" else "bad"
            (out / name / split / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(root / image, out / name / split / kind)
            if (root / mask).is_file():
                values = np.array(Image.open(root / mask))
                write_mask(out / name / "ground_truth/bad" / mask.split("/")[-1], np.where(values != 0, 255, 0))
        converted, raw = read_dataset(out), read_dataset(root)
        assert list(converted) == list(raw)
        for name in raw:
            assert [path.name for path in converted[name].train] == [path.name for path in raw[name].train]
            for ours, theirs in zip(converted[name].test, raw[name].test, strict=True):
                assert (ours.path.name, ours.label, ours.indexed) == (theirs.path.name, theirs.label, False)
                assert (ours.mask() is None) == (theirs.mask() is None)
                assert ours.mask() is None or np.array_equal(ours.mask(), theirs.mask())

    def test_what_training_takes(self, root):
        def taken(*arguments):
            parser = argparse.ArgumentParser()
            add_arguments(parser, report_to="none")
            args = parser.parse_args(["--data", str(root), "--output_dir", "out", *arguments])
            shots = train_data.read_shots(args, report=pytest.fail)
            return {name: sorted(source for source, _ in pairs) for name, pairs in shots.items()}

        names = {name: [str(path) for path in category.train] for name, category in read_dataset(root).items()}
        assert taken() == names
        assert taken("--categories", "pcb", "pcb") == {"pcb": names["pcb"]}
        with pytest.raises(ValueError, match="^`--categories` has 'bolt'.*candle, pcb"):
            taken("--categories", "pcb", "bolt")
        with pytest.raises(ValueError, match="^`--shots` is 3, but `--data` holds only 2 readable pictures"):
            taken("--shots", "3")
        (root / "pcb/Data/Images/Normal/0003.JPG").unlink()
        with pytest.raises(ValueError, match="^`--data`.*lacks 1 pictures"):
            taken()

    def test_lacking(self, root):
        (root / "pcb/Data/Images/Normal/0003.JPG").unlink()
        with pytest.raises(ValueError, match="`root`.*lacks 1 pictures.*'pcb'.*0003.JPG"):
            read_dataset(root)
        assert list(read_dataset(root, ["candle"])) == ["candle"]
        with pytest.raises(ValueError, match="`category` has 'bolt'.*candle, pcb"):
            read_visa(root, "bolt")

    @pytest.mark.parametrize(
        ("rows", "sentence"),
        [
            ([], "lacks rows or a column"),
            (rows[:1], "lacks rows or a column"),
            (["object,split,image,mask", "pcb,train,a.JPG,"], "lacks rows or a column"),
            ([*rows, "pcb,train,anomaly,pcb/a.JPG,"], "line 10"),
            ([*rows, "pcb,val,normal,pcb/a.JPG,"], "line 10"),
            ([*rows, "pcb,test,normal"], "line 10"),
            ([*rows, "pcb,test,normal,../a.JPG,"], "line 10"),
            ([*rows, "pcb,test,anomaly,pcb/a.JPG,/a.png"], "line 10"),
            (rows[:4], "without train or test rows"),
        ],
    )
    def test_bad_tables(self, root, rows, sentence):
        self.table(root, rows)
        with pytest.raises(ValueError, match=f"`root`.*1cls.csv.*{sentence}"):
            read_dataset(root, ["candle"])

    def test_unreadable_table(self, root):
        (root / "split_csv/1cls.csv").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="`root`.*no readable 'split_csv/1cls.csv'"):
            read_dataset(root)
        with pytest.raises(ValueError, match="`root`.*no readable 'split_csv/1cls.csv'"):
            read_visa(root / "pcb", "pcb")


class TestDataset:
    @pytest.fixture
    def root(self, tmp_path):
        for name in ("nut", "bolt", ".hidden"):
            write(tmp_path / name, "train/good/0.png", "test/good/0.png")
        write(tmp_path, "pictures/0.png")
        return tmp_path

    def test_categories(self, root):
        assert read_dataset(str(root)) == {name: read_mvtec(root, name) for name in ("bolt", "nut")}
        assert list(read_dataset(root)) == ["bolt", "nut"]
        assert list(read_dataset(root, ["nut", "bolt", "nut"])) == ["nut", "bolt"]

    @pytest.mark.parametrize("name", ["pictures", "../nut", ".hidden", ""])
    def test_unknown_category(self, root, name):
        with pytest.raises(ValueError, match=re.escape(f"`categories` has {name!r}") + ".*bolt, nut; choose"):
            read_dataset(root, ["nut", name])

    def test_unknown_layout(self, root):
        with pytest.raises(ValueError, match="`root`.*nowhere' is no folder"):
            read_dataset(root / "nowhere")
        with pytest.raises(ValueError, match="`root`.*'<category>/train/good'.*1cls.csv.*give a data set"):
            read_dataset(root / "pictures")
        with pytest.raises(ValueError, match="give the folder it is in"):
            read_dataset(root / "nut")


class TestFolder:
    @pytest.fixture
    def root(self, tmp_path):
        write(tmp_path, *(f"normal/{index}.png" for index in range(5)), *(f"fresh/{index}.png" for index in range(2)))
        write(tmp_path, "broken/a.png", "broken/b.png", "broken/crack/a.png", "masks/a.png", "masks/crack/a_mask.png")
        return tmp_path

    def test_all_folders(self, root):
        category = read_folder("nut", root / "normal", root / "broken", root / "masks", root / "fresh")
        assert category.name == "nut"
        assert category.train == [root / f"normal/{index}.png" for index in range(5)]
        assert category.test == [
            TestImage(root / "fresh/0.png", False, "good", None),
            TestImage(root / "fresh/1.png", False, "good", None),
            TestImage(root / "broken/a.png", True, "abnormal", root / "masks/a.png"),
            TestImage(root / "broken/b.png", True, "abnormal", None),
            TestImage(root / "broken/crack/a.png", True, "crack", root / "masks/crack/a_mask.png"),
        ]

    def test_halves(self, root, tmp_path_factory):
        category = read_folder("nut", str(root / "normal"), str(root / "broken"))
        good = [image.path for image in category.test if not image.label]
        assert len(category.train) == 3 and len(good) == 2
        assert sorted([*category.train, *good]) == sorted((root / "normal").iterdir())
        assert sorted(good) == good and sorted(category.train) == category.train
        assert all(image.mask_path is None for image in category.test)
        moved = tmp_path_factory.mktemp("moved") / "parts"
        shutil.copytree(root / "normal", moved)
        assert [path.name for path in read_folder("nut", moved).train] == [path.name for path in category.train]

    @pytest.mark.parametrize(
        ("folders", "sentence"),
        [
            ({"normal_dir": "nowhere"}, "`normal_dir`.*nowhere.*does not exist"),
            ({"abnormal_dir": "nowhere"}, "`abnormal_dir`.*nowhere.*does not exist"),
            ({"normal_dir": "one"}, "`normal_dir`.*holds one picture"),
            ({"abnormal_dir": None}, "`mask_dir`.*give both"),
            ({"abnormal_dir": "normal"}, "`abnormal_dir` and `normal_dir` both hold"),
            ({"normal_dir": "."}, "`normal_dir` and `mask_dir` both hold"),
            ({"normal_test_dir": "normal"}, "`normal_test_dir` and `normal_dir` both hold"),
            ({"abnormal_dir": "broken/crack"}, "`mask_dir`.*masks.*no mask of any picture"),
        ],
    )
    def test_bad_folders(self, root, folders, sentence):
        write(root, "one/0.png")
        (root / "masks/a.png").rename(root / "masks/b.png")
        given = {"normal_dir": "normal", "abnormal_dir": "broken", "mask_dir": "masks", **folders}
        with pytest.raises(ValueError, match=sentence):
            read_folder("nut", **{argument: name and root / name for argument, name in given.items()})


class TestLoadMask:
    def test_shades(self, tmp_path):
        gray = np.zeros((20, 30), np.uint8)
        gray[5:15, 6:18] = 255
        gray[0] = 127
        gray[1] = 128
        write_mask(tmp_path / "m.png", gray)
        mask = load_mask(tmp_path / "m.png")
        assert mask.dtype == bool and np.array_equal(mask, gray >= 128)
        twice = np.kron(gray >= 128, np.ones((2, 2), bool))
        assert (load_mask(tmp_path / "m.png", (40, 60)) == twice).mean() > 0.97
        assert load_mask(tmp_path / "m.png", 16).shape == (16, 16)
        write_mask(tmp_path / "labels.png", gray == 255)
        assert np.array_equal(load_mask(tmp_path / "labels.png", (20, 30)), gray == 255)
        with pytest.raises(ValueError, match="`path`.*nowhere"):
            load_mask(tmp_path / "nowhere.png")

    @pytest.mark.parametrize("values", [(2,), (3,), (127,), (1, 2, 3), (100, 255), (1, 255)])
    def test_every_value_but_the_background_is_a_defect(self, tmp_path, values):
        given = blocks(*((0, 5 * place, value) for place, value in enumerate(values)))
        marked = given > 0
        write_mask(tmp_path / "gray.png", given)
        Image.fromarray(given.astype(np.uint16) * 200).save(tmp_path / "deep.png")
        for channel in range(3):
            color = np.zeros((*given.shape, 3), np.uint8)
            color[..., channel] = given
            Image.fromarray(color).save(tmp_path / f"color-{channel}.png")
        write_mask(tmp_path / "palette.png", given, palette=[0, 0, 0, *(255, 0, 0) * 255])
        # Index 0 is white, as in a picture that was reduced to two colors.
        write_mask(tmp_path / "reduced.png", given == 0, palette=[255, 255, 255, 0, 0, 0])
        # No color is black: index 0 is the background.
        write_mask(tmp_path / "white.png", marked, palette=[255, 255, 255, 255, 0, 0])
        for path in sorted(tmp_path.iterdir()):
            assert np.array_equal(load_mask(path), marked), path.name

    def test_shades_of_an_edge_are_no_classes(self, tmp_path):
        sharp = np.kron(blocks((3, 5, 255)), np.ones((8, 8), np.uint8))
        soft = Image.fromarray(sharp).resize((70, 42), Image.Resampling.BILINEAR)
        assert len(np.unique(np.asarray(soft))) > 2
        for name in ("soft.png", "loss.jpg"):
            soft.save(tmp_path / name, quality=60)
            assert np.array_equal(load_mask(tmp_path / name), np.asarray(Image.open(tmp_path / name)) > 127), name

    def test_a_mask_of_another_size_than_its_picture(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (20, 12)).save(tmp_path / "turned.jpg", exif=exif)
        Image.new("RGB", (20, 12)).save(tmp_path / "plain.png")
        write_mask(tmp_path / "mask.png", blocks((0, 0, 255)))
        write_mask(tmp_path / "small.png", blocks((0, 0, 255))[:8, :10])
        assert TestImage(tmp_path / "plain.png", True, "crack", tmp_path / "mask.png").mask(8).shape == (8, 8)
        for name, mask, sentence in (
            ("plain.png", "small.png", "small.png' has 10 x 8 pixels (width x height), but its picture"),
            ("plain.png", "small.png", "plain.png' has 20 x 12; give"),
            ("turned.jpg", "mask.png", "has 12 x 20, which its EXIF data turn upright; give the mask the size"),
        ):
            with pytest.raises(ValueError, match="^`path`.*" + re.escape(sentence)):
                TestImage(tmp_path / name, True, "crack", tmp_path / mask).mask(8)

    def test_classes_in_a_palette_and_in_color(self, tmp_path):
        values = blocks((0, 0, 1), (6, 10, 2))
        # Index 0 is white and index 2 black: colors say nothing about which index is defect.
        write_mask(tmp_path / "palette.png", values, palette=[255, 255, 255, 9, 9, 9, 0, 0, 0])
        write_mask(tmp_path / "color.png", np.stack([values * 0, values * 0, values], -1))
        for name in ("palette.png", "color.png"):
            assert np.array_equal(load_mask(tmp_path / name, indexed=True), values > 0)

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match="`path`.*holds no pictures"):
            load_mask(tmp_path)
