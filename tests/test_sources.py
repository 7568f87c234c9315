"""Pictures in files, folders and Hugging Face datasets, and how processes share them."""

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalysd_pipeline.data.sources import MAX_NORMALS, Files, Listing, gather, read_normals


def png(value, size=(12, 10)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def value_of(image):
    red, green, blue = image.getpixel((0, 0))
    assert (green, blue) == (255 - red, 7)
    return red


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.fixture(scope="module")
def datasets():
    found = pytest.importorskip("datasets")
    found.disable_progress_bars()
    return found


@pytest.fixture(scope="module")
def parquet(datasets, tmp_path_factory):
    """A folder with the split `test` in three files of 4, 3 and 2 pictures, of values 0 to 8, and `train` of one."""
    folder = tmp_path_factory.mktemp("parquet")
    features = datasets.Features(
        {"label": datasets.Value("int64"), "image": datasets.Image(), "mask": datasets.Image()}
    )

    def write(name, values):
        rows = [{"label": v, "image": {"bytes": png(v), "path": f"part {v}.png"}, "mask": None} for v in values]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / name)

    for shard, values in enumerate(((0, 1, 2, 3), (4, 5, 6), (7, 8))):
        write(f"test-{shard:05d}-of-00003.parquet", values)
    write("train-00000-of-00001.parquet", [100])
    return folder


@pytest.fixture(scope="module")
def saved(datasets, tmp_path_factory):
    """A dataset that `save_to_disk` wrote: bytes in a column that is not called image, and an empty cell."""
    folder = tmp_path_factory.mktemp("saved") / "parts"
    rows = {"photo": [png(20), b"not a picture", None], "number": [1, 2, 3]}
    features = datasets.Features({"photo": datasets.Value("binary"), "number": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return folder


def dealt(listing, world, **options):
    return [list(listing.deal(rank, world, **options)) for rank in range(world)]


class TestFiles:
    def test_names_differ_and_results_are_skipped(self, tmp_path):
        files = ["x/a.png", "x/a.jpg", "x/sub/A.png", "y/a.png", "y/A_2.png", "x/out/old.png"]
        touch(tmp_path, *files)
        listing = gather([tmp_path / "x", tmp_path / "y", tmp_path / "y" / "a.png"], skip=tmp_path / "x" / "out")
        assert not listing.errors and listing.total == 5
        pictures = list(listing.deal())
        found = [Path(picture.file).relative_to(tmp_path).as_posix() for picture in pictures]
        assert sorted(found) == sorted(set(files) - {"x/out/old.png"})
        assert len({picture.name.casefold() for picture in pictures}) == len(pictures)
        assert pictures[found.index("x/sub/A.png")].name == "sub/A"

    def test_results_of_an_inspection_are_no_pictures(self, tmp_path):
        touch(tmp_path, "a.png", "old/montage.png", "old/heatmaps/a.png", "new/montage.png")
        for name in ("old", "new"):
            (tmp_path / name / "run.json").write_text('{"facts": {}, "given": {}}')
        told = []
        listing = gather([tmp_path, tmp_path / "old"], tmp_path / "new", report=told.append)
        assert [picture.file for picture in listing.deal()] == [str(tmp_path / "a.png")]
        assert told == [f"`source` '{tmp_path}': left out results of an inspection in folders (1)."]
        assert "old' holds results of an inspection; give the folder of the pictures" in listing.errors[1][1]

    def test_names_stay_inside_the_folder(self, tmp_path, monkeypatch):
        touch(tmp_path, "a.png", "work/b.png")
        monkeypatch.chdir(tmp_path / "work")
        listing = gather(["../a.png", ".."], skip=tmp_path / "out")
        assert listing.total == 2
        assert all(".." not in picture.name for picture in listing.deal())

    def test_names_of_earlier_outputs_are_kept(self, tmp_path):
        touch(tmp_path, "a.png", "a.jpg")
        first = {picture.file: picture.name for picture in gather([tmp_path], skip=tmp_path / "out").deal()}
        touch(tmp_path, "a.bmp")
        second = {p.file: p.name for p in gather([tmp_path], tmp_path / "out", first).deal()}
        assert len(set(second.values())) == 3
        assert all(second[file] == name for file, name in first.items())

    def test_machines_divide_it_whatever_each_has_done(self, tmp_path):
        names = [f"{number:02}.png" for number in range(11)]
        touch(tmp_path / "x", *names)
        touch(tmp_path, "y/a.png", "z/b.png")
        listing = gather([tmp_path / "y" / "a.png", tmp_path / "x", tmp_path / "z"], skip=tmp_path / "out")
        whole = [picture.file for picture in listing.deal()]
        parts = [[picture.file for picture in listing.deal(part=part, parts=3)] for part in range(3)]
        assert sorted(sum(parts, [])) == sorted(whole) and parts[0] == whole[::3]
        left = list(listing.deal(part=0, parts=3, done=lambda picture: picture.file in parts[0][:2]))
        assert [picture.file for picture in left] == parts[0][2:]
        apart = [[p.file for p in listing.deal(rank, 2, part=0, parts=3)] for rank in range(2)]
        assert apart == [parts[0][::2], parts[0][1::2]]

    def test_a_missing_source_is_told_and_the_others_listed(self, tmp_path):
        touch(tmp_path, "x/a.png")
        listing = gather([tmp_path / "gone", tmp_path / "x"], skip=tmp_path / "out")
        assert list(listing.sources) == [1] and list(listing.errors) == [0]
        given, sentence = listing.errors[0]
        assert given == str(tmp_path / "gone") and "does not exist" in sentence

    def test_normals_of_files_are_all_taken(self, tmp_path):
        for value in range(3):
            (tmp_path / f"{value}.png").write_bytes(png(value))
        (tmp_path / "torn.png").write_bytes(png(9)[:40])
        sentences = []
        assert [value_of(image) for image in read_normals([tmp_path], sentences.append)] == [0, 1, 2]
        assert len(sentences) == 1 and "torn.png" in sentences[0]


class TestDeal:
    @pytest.mark.parametrize("world", [1, 2, 3, 5])
    def test_every_picture_falls_to_one_process(self, world):
        names = [[f"{source}{i}" for i in range(count)] for source, count in (("a", 5), ("b", 1), ("c", 4))]
        listing = Listing({i: Files("abc"[i], own, own) for i, own in enumerate(names)}, {})
        shares = [[picture.file for picture in share] for share in dealt(listing, world)]
        everything = sum(names, [])
        assert shares == [everything[rank::world] for rank in range(world)]

    def test_what_is_left_is_dealt_evenly(self):
        names = [str(i) for i in range(12)]
        listing = Listing({0: Files("x", names, names)}, {})
        shares = dealt(listing, 2, done=lambda picture: int(picture.file) % 2 == 0)
        assert [[picture.file for picture in share] for share in shares] == [["1", "5", "9"], ["3", "7", "11"]]

    def test_a_folder_is_never_taken_for_read(self):
        ends, listing = [], Listing({0: Files("x", ["a"], ["a"])}, {})
        pictures = list(listing.deal(read=lambda *shard: True, at_end=lambda *end: ends.append(end)))
        assert len(pictures) == 1 and not ends


class TestDatasets:
    def test_pictures_of_a_split_in_order(self, parquet, tmp_path):
        given = f"{parquet}?split=test&column=image"
        listing = gather([given], skip=tmp_path)
        assert listing.total is None
        pictures = list(listing.deal())
        assert [value_of(picture.load()) for picture in pictures] == list(range(9))
        assert pictures[5].file == f"{given}#1/1:part 5.png"
        assert pictures[5].name.endswith("/00001-000001-part_5") and pictures[5].name.count("/") == 1
        place = listing.places()
        rows = [{"file": p.file, "source": p.source, "shard": p.shard, "row": p.row} for p in pictures]
        assert [place(row) for row in rows] == sorted(place(row) for row in rows)
        assert place({**rows[0], "source": "another"}) is None

    @pytest.mark.parametrize("world", [2, 3])
    def test_processes_read_files_of_their_own(self, world, parquet, tmp_path):
        listing = gather([f"{parquet}?split=test&column=image"], skip=tmp_path)
        shares = [{picture.shard for picture in share} for share in dealt(listing, world)]
        assert shares == [set(range(3)[rank::world]) for rank in range(world)]

    def test_more_processes_than_files_share_them_by_picture(self, parquet, tmp_path):
        listing = gather([f"{parquet}?split=test&column=image"], skip=tmp_path)
        shares = [[value_of(picture.load()) for picture in share] for share in dealt(listing, 4)]
        assert shares == [[0, 4, 8], [1, 5], [2, 6], [3, 7]]

    @pytest.mark.parametrize(
        ("parts", "expected"), [(2, [[0, 1, 2, 3, 7, 8], [4, 5, 6]]), (4, [[0, 4, 7], [1, 5, 8]])]
    )
    def test_machines_read_files_of_their_own_or_share_them(self, parts, expected, parquet, tmp_path):
        listing, ends = gather([f"{parquet}?split=test&column=image"], skip=tmp_path), []
        shares = [
            [
                value_of(p.load())
                for p in listing.deal(part=part, parts=parts, at_end=lambda *end: ends.append(end[1:]))
            ]
            for part in range(parts)
        ]
        assert shares[:2] == expected and sorted(sum(shares, [])) == list(range(9))
        # A part of a data file must not look like all of it.
        assert sorted(ends) == ([(0, 4), (1, 3), (2, 2)] if parts == 2 else [])

    def test_a_file_that_is_done_is_not_read_again(self, parquet, tmp_path):
        listing = gather([f"{parquet}?split=test&column=image"], skip=tmp_path)
        ends = []
        pictures = listing.deal(read=lambda source, shard: shard == 0, at_end=lambda *end: ends.append(end[1:]))
        assert {picture.shard for picture in pictures} == {1, 2}
        assert ends == [(1, 3), (2, 2)]

    def test_one_file_with_one_split_needs_no_options(self, datasets, tmp_path):
        rows = {"image": [{"bytes": png(50), "path": None}]}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "parts.parquet")
        for given in (tmp_path / "parts.parquet", tmp_path):
            (picture,) = gather([given], skip=tmp_path / "out").deal()
            assert value_of(picture.load()) == 50 and picture.file == f"{given}#0"

    def test_a_folder_with_pictures_is_a_folder(self, parquet, tmp_path):
        os.symlink(parquet / "train-00000-of-00001.parquet", tmp_path / "train.parquet")
        (tmp_path / "a.png").write_bytes(png(1))
        assert [picture.name for picture in gather([tmp_path], skip=tmp_path / "out").deal()] == ["a"]

    def test_saved_bytes_and_bad_cells(self, saved, tmp_path):
        first, second, third = gather([f"{saved}?column=photo"], skip=tmp_path).deal()
        assert value_of(first.load()) == 20
        for picture, word in ((second, "not a picture"), (third, "empty cell")):
            with pytest.raises(ValueError, match=word) as raised:
                picture.load()
            assert f"'{picture.file}'" in str(raised.value)

    def test_a_cell_may_not_name_an_address(self, datasets, tmp_path):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        (tmp_path / "real.png").write_bytes(png(30))
        paths = [str(tmp_path / "real.png"), "http://127.0.0.1:9/a.png"]
        # Written by hand, because the package would put the bytes of the files into the table.
        rows = [{"image": {"bytes": None, "path": path}} for path in paths]
        schema = datasets.Features({"image": datasets.Image()}).arrow_schema
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), tmp_path / "x.parquet")
        first, second = gather([tmp_path / "x.parquet"], skip=tmp_path / "out").deal()
        assert value_of(first.load()) == 30
        assert second.content is None
        assert "/" not in second.name.partition("/")[2]

    def test_a_picture_is_decoded_with_care(self, datasets, tmp_path):
        gray = Image.fromarray(np.full((9, 9), 40000, np.uint16))
        buffer = io.BytesIO()
        gray.save(buffer, "PNG")
        pictures = [buffer.getvalue(), png(1, size=(4, 4)), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n"]
        features = datasets.Features({"image": datasets.Image(decode=False)})
        rows = {"image": [{"bytes": data, "path": "x.png"} for data in pictures]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
        deep, small, script = gather([tmp_path / "x.parquet"], skip=tmp_path / "out").deal()
        assert deep.load().getpixel((0, 0)) == (156, 156, 156)  # 40000 / 65535 of 255
        with pytest.raises(ValueError, match="4 x 4 pixels"):
            small.load()
        with pytest.raises(ValueError, match="not a picture in a format we read"):
            script.load()

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            ("?split=gone", "has no split 'gone', only train, test"),
            ("", "must name one of its splits (train, test)"),
            ("?split=test&column=label", "has no column 'label' of pictures (image, mask)"),
            ("?spilt=test", "unknown option 'spilt'; those of a dataset are split, column, name"),
            ("?split=test&revision=1", "unknown option 'revision'"),
            ("?split=test&name=gone", "'gone' not found. Available: ['default']"),
        ],
    )
    def test_what_is_mistyped_lists_what_there_is(self, options, part, parquet, tmp_path):
        with pytest.raises(ValueError, match="`source`") as raised:
            gather([f"{parquet}{options}"], skip=tmp_path)
        assert part in str(raised.value)

    @pytest.mark.parametrize(
        ("given", "part"),
        [("hf://user/no/name", "must have the form"), ("hf://user/name", "cannot be opened as a dataset")],
    )
    def test_a_bad_name_on_the_hub_is_one_sentence(self, given, part, datasets, tmp_path):
        with pytest.raises(ValueError, match=part) as raised:
            gather([given], skip=tmp_path)
        assert given in str(raised.value) and "\n" not in str(raised.value)

    def test_without_the_package_the_sentence_says_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ValueError, match=r"`pip install 'anomalysd-pipeline\[datasets\]'`"):
            gather(["hf://user/name"], skip=tmp_path)

    def test_a_damaged_table_says_where_it_ends(self, parquet, tmp_path):
        data = (parquet / "test-00000-of-00003.parquet").read_bytes()
        (tmp_path / "test.parquet").write_bytes(data)
        listing = gather([f"{tmp_path}?column=image"], skip=tmp_path / "out")
        (tmp_path / "test.parquet").write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match="could not be read from its picture 0 on"):
            list(listing.deal())

    def test_normals_of_a_dataset_are_limited(self, datasets, tmp_path):
        count = MAX_NORMALS + 2
        features = datasets.Features({"image": datasets.Image()})
        rows = {"image": [{"bytes": png(value), "path": None} for value in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
        sentences = []
        normals = read_normals([tmp_path / "x.parquet"], sentences.append)
        assert [value_of(image) for image in normals] == list(range(MAX_NORMALS))
        assert len(sentences) == 1 and f"first {MAX_NORMALS}" in sentences[0]
