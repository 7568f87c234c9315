"""What visitors send, as an attacker would: each refused with a sentence that tells nothing of the server."""

import dataclasses
import stat
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from anomalysd_pipeline.app.limits import Limits
from anomalysd_pipeline.app.uploads import expand, read_picture
from anomalysd_pipeline.data.images import load_image

from .hostile_files import encoded, gif_header, picture, png_header, tiff_tags, webp_header

LIMITS = Limits(upload_bytes=200_000, unpacked_bytes=300_000, zip_entries=12, pictures=6, side=64)


@pytest.fixture
def put(tmp_path):
    """Writes bytes to a new file."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def pack(tmp_path):
    """Writes a zip of names, or `ZipInfo`s, with their contents."""

    def write(*entries, name="batch.zip", method=zipfile.ZIP_DEFLATED):
        path = tmp_path / name
        with zipfile.ZipFile(path, "w", method) as archive:
            for entry, content in entries:
                archive.writestr(entry, content)
        return path

    return write


def refusal(call, path) -> str:
    """The sentence of a refusal; it must be one, and name no place of the server."""
    with pytest.raises(ValueError) as error:
        call()
    sentence = str(error.value)
    assert str(path.parent) not in sentence and "Traceback" not in sentence
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 400
    return sentence


class TestPictures:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
    def test_are_read_as_elsewhere(self, put, kind):
        path = put("a.bin", encoded(kind=kind))
        image = read_picture(path)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(load_image(path)))

    @pytest.mark.parametrize(("size", "shown"), [((200, 100), (64, 32)), ((64, 20), (64, 20)), ((2000, 9), (64, 8))])
    def test_large_ones_are_scaled_down(self, put, size, shown):
        assert read_picture(put("a.png", encoded(picture(size))), limits=LIMITS).size == shown

    def test_a_large_file(self, put):
        path = put("a.png", encoded() + bytes(200_000))
        assert refusal(lambda: read_picture(path, "mine.png", LIMITS), path).startswith(
            "'mine.png' is larger than 0.2"
        )

    def test_more_pixels_than_this_app_allows(self, put):
        path = put("a.png", encoded(picture((40, 30))))
        assert "more than 0.001 megapixels" in refusal(lambda: read_picture(path, limits=Limits(pixels=1000)), path)

    @pytest.mark.parametrize(
        "bomb",
        [
            png_header(12_000, 12_000),
            png_header(2**31 - 1, 2**31 - 1),
            gif_header((12_000, 12_000), (12_000, 12_000)),
            gif_header((16, 16), (12_000, 12_000)),
            gif_header((65_535, 65_535), (16, 16)),
            tiff_tags(12_000, 12_000),
            tiff_tags(2**31 - 1, 2**31 - 1),
            encoded(picture((8, 8)), "BMP")[:18] + struct.pack("<llHH", 12_000, 12_000, 1, 24) + bytes(400),
        ],
        ids=["png", "png-huge", "gif", "gif-frame", "gif-screen", "tiff", "tiff-huge", "bmp"],
    )
    def test_bombs_are_refused_by_their_header(self, put, bomb):
        path = put("bomb.png", bomb)
        assert refusal(lambda: read_picture(path), path).startswith("'bomb.png' has more than 100 megapixels")

    def test_a_canvas_without_a_picture(self, put):
        path = put("a.webp", webp_header(12_000, 12_000))
        assert refusal(lambda: read_picture(path), path).startswith("'a.webp' is damaged")

    @pytest.mark.parametrize("side", [2**12, 2**15, 2**31 - 16])
    def test_a_tile_far_larger_than_its_picture(self, put, side):
        path = put("tile.tif", tiff_tags(32, 32, w=side, h=side))
        assert "tiles far larger than itself" in refusal(lambda: read_picture(path), path)

    def test_a_tile_of_nothing(self, put):
        path = put("tile.tif", tiff_tags(32, 32, w=0, h=0))
        assert "cannot be decoded" in refusal(lambda: read_picture(path), path)

    @pytest.mark.parametrize(
        "content",
        [b"", b"not a picture", b"<svg onload=alert(1)></svg>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x80\x04\x95pickle"]
        + [encoded()[:-40], encoded(kind="JPEG")[:200]],
    )
    def test_what_is_no_whole_picture(self, put, content):
        path = put("a.png", content)
        assert refusal(lambda: read_picture(path), path).startswith("'a.png' is ")

    def test_texts_that_unpack_to_megabytes(self, put):
        data = encoded()
        text = b"Comment\0\0" + zlib.compress(b"x" * 80_000_000)
        chunk = struct.pack(">L", len(text)) + b"zTXt" + text + struct.pack(">L", zlib.crc32(b"zTXt" + text))
        path = put("text.png", data[:33] + chunk + data[33:])
        assert refusal(lambda: read_picture(path), path).startswith("'text.png' is damaged")

    def test_a_missing_file_and_a_folder(self, tmp_path):
        for path in (tmp_path / "none.png", tmp_path):
            assert "upload it again" in refusal(lambda path=path: read_picture(path, "x.png"), path)


class TestFiles:
    def test_each_is_a_row_and_a_bad_one_stops_none(self, put):
        paths = [put("a.png", encoded()), put("b.png", b"no"), put("c.jpg", encoded(kind="JPEG"))]
        rows = expand(paths, LIMITS)
        assert [row.shown_name for row in rows] == ["a.png", "b.png", "c.jpg"]
        assert rows[0].load().size == rows[2].load().size == (32, 24)
        assert "'b.png' is damaged" in refusal(rows[1].load, paths[1])

    def test_equal_names_are_told_apart(self, tmp_path):
        paths = []
        for folder in "abc":
            (tmp_path / folder).mkdir()
            paths.append(tmp_path / folder / "x.png")
            paths[-1].write_bytes(encoded(picture(seed=ord(folder))))
        rows = expand(paths, LIMITS)
        assert [row.shown_name for row in rows] == ["x.png", "x.png (2)", "x.png (3)"]
        assert len({row.load().tobytes() for row in rows}) == 3

    def test_equal_names_in_two_zips_are_told_apart_by_the_zip(self, tmp_path):
        for name in ("a.zip", "b.zip"):
            with zipfile.ZipFile(tmp_path / name, "w") as archive:
                archive.writestr("line/1.png", b"x")
        rows = expand([tmp_path / "a.zip", tmp_path / "b.zip"])
        assert [row.shown_name for row in rows] == ["line/1.png", "b.zip/line/1.png"]

    def test_too_many(self, put):
        rows = expand([put(f"{index}.png", encoded()) for index in range(9)], LIMITS)
        assert len(rows) == 7 and rows[6].shown_name == "3 more"
        assert "At most 6 pictures" in rows[6].error and all(row.error is None for row in rows[:6])

    def test_none(self):
        with pytest.raises(ValueError, match="`files` is empty"):
            expand([])

    def test_a_missing_one(self, tmp_path, put):
        rows = expand([tmp_path / "none.png", put("big.png", bytes(200_001))], LIMITS)
        assert "not there anymore" in rows[0].error and "larger than 0.2 MB" in rows[1].error
        with pytest.raises(ValueError, match="not there anymore"):
            rows[0].load()


def special(name, kind):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    return info


def raw_name(name: str, stored: str, path) -> None:
    """Replaces a name in a zip, byte for byte; zipfile itself would refuse or mend it."""
    assert len(name) == len(stored)
    path.write_bytes(path.read_bytes().replace(name.encode(), stored.encode()))


class TestZips:
    def test_its_pictures_in_order(self, pack):
        path = pack(("b.png", encoded(picture(seed=1))), ("sub/a.JPG", encoded(kind="JPEG")))
        rows = expand([path], LIMITS)
        assert [row.shown_name for row in rows] == ["b.png", "sub/a.JPG"]
        assert np.array_equal(np.asarray(rows[0].load()), np.asarray(picture(seed=1)))

    def test_a_name_without_suffix_does_not_hide_a_zip(self, pack):
        assert [row.shown_name for row in expand([pack(("a.png", encoded()), name="blob")], LIMITS)] == ["a.png"]

    def test_what_systems_add_is_left_out(self, pack):
        path = pack(
            ("__MACOSX/._a.png", b"x"), (".DS_Store", b"x"), ("s/", b""), ("s/Thumbs.db", b"x"), ("s/a.png", encoded())
        )
        assert [row.shown_name for row in expand([path], LIMITS)] == ["s/a.png"]

    @pytest.mark.parametrize(
        "name",
        [
            "../a.png",
            "x/../../a.png",
            "/etc/a.png",
            "..\\a.png",
            "\\\\host\\a.png",
            "C:\\a.png",
            "C:a.png",
            "a/..",
            "..",
        ],
    )
    def test_names_that_lead_out(self, pack, tmp_path, name):
        before = {path.name for path in tmp_path.iterdir()} | {"batch.zip"}
        rows = expand([pack((name, encoded()), ("good.png", encoded()))], LIMITS)
        assert "leads out of the zip" in rows[0].error and rows[1].load().size == (32, 24)
        assert {path.name for path in tmp_path.iterdir()} == before

    def test_a_nul_in_a_name(self, pack):
        path = pack(("a.png?.exe", encoded()))
        raw_name("a.png?.exe", "a.png\0.exe", path)
        (row,) = expand([path], LIMITS)
        assert row.opener is None and "\0" not in row.shown_name + row.error

    @pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
    def test_links_and_devices(self, pack, kind):
        (row,) = expand([pack((special("a.png", kind), b"/etc/passwd"))], LIMITS)
        assert "is a link or no file" in row.error and row.opener is None

    def test_other_things(self, pack):
        names = ["inner.zip", "x.tar.gz", "notes.txt", "run.exe"]
        rows = expand([pack(*((name, b"x") for name in names))], LIMITS)
        assert [row.error.split("' ")[1][:18] for row in rows] == ["is an archive with"] * 2 + [
            "is no picture by i"
        ] * 2

    def test_a_zip_within_a_picture_name(self, pack):
        inner = pack(("a.png", encoded()), name="inner.zip").read_bytes()
        (row,) = expand([pack(("a.png", inner))], LIMITS)
        with pytest.raises(ValueError, match=r"'a.png' is damaged or not a picture"):
            row.load()

    def test_the_same_name_twice(self, pack):
        with pytest.warns(UserWarning, match="Duplicate"):
            path = pack(("a.png", encoded(picture(seed=1))), ("a.png", encoded(picture(seed=2))))
        first, second = expand([path], LIMITS)
        assert np.array_equal(np.asarray(first.load()), np.asarray(picture(seed=1)))
        assert second.shown_name == "a.png (2)" and "occurs twice" in second.error

    def test_an_encrypted_one(self, pack):
        path = pack(("a.png", encoded()))
        data = bytearray(path.read_bytes())
        for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            data[data.find(signature) + offset] |= 1
        path.write_bytes(data)
        assert "is encrypted" in expand([path], LIMITS)[0].error

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_unusual_methods(self, pack, method):
        assert "unusual method" in expand([pack(("a.png", encoded()), method=method)], LIMITS)[0].error

    def test_too_many_entries(self, pack):
        path = pack(*((f"{index}.txt", b"") for index in range(13)))
        (row,) = expand([path], LIMITS)
        assert "'batch.zip' holds more than 12 files" in row.error

    def test_a_huge_directory_is_not_read(self, pack):
        path = pack(*((f"{index:08}.txt", b"") for index in range(3000)))
        tracemalloc.start()
        try:
            assert "holds more than 12 files" in expand([path], Limits(zip_entries=12))[0].error
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()

    def test_a_zip_without_pictures(self, pack):
        assert "holds no pictures" in expand([pack(("a/", b""))], LIMITS)[0].error
        assert "holds no pictures" in expand([pack()], LIMITS)[0].error


class TestZipBombs:
    def test_an_entry_whose_header_says_so(self, pack):
        assert "larger than 0.2 MB" in expand([pack(("a.png", bytes(300_000)))], LIMITS)[0].error

    def test_an_entry_whose_header_lies(self, pack):
        path = pack(("a.png", bytes(30_000_000)))
        data = path.read_bytes().replace(struct.pack("<L", 30_000_000), struct.pack("<L", 1000))
        path.write_bytes(data)
        (row,) = expand([path], LIMITS)
        tracemalloc.start()
        try:
            assert "'a.png'" in refusal(row.load, path)
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()

    def test_many_entries_share_one_bound(self, pack):
        noise = encoded(picture((200, 120)))  # some 72 kB, which cannot be packed
        path = pack(*((f"{index}.png", noise) for index in range(6)))
        limits = dataclasses.replace(LIMITS, upload_bytes=1_000_000)
        rows, outcomes = expand([path], limits), []
        for row in rows:
            try:
                outcomes.append(row.load().size)
            except ValueError as error:
                outcomes.append(str(error))
        most = limits.unpacked_bytes // len(noise)
        assert outcomes[:most] == [(64, 38)] * most
        assert all("more than 0.3 MB unpacked" in outcome for outcome in outcomes[most:]) and most < 6

    def test_entries_that_share_their_bytes(self, pack):
        path = pack(("a.png", encoded()), ("b.png", encoded()))
        data = path.read_bytes()
        second = data.find(b"PK\x01\x02", data.find(b"PK\x01\x02") + 1)
        path.write_bytes(data[: second + 42] + bytes(4) + data[second + 46 :])  # at the first one's place
        (row,) = expand([path], LIMITS)
        assert "share bytes" in row.error

    def test_a_zip_that_holds_itself(self, put):
        # The directory names the whole file as its only, stored entry.
        name = b"r.zip"
        local = b"PK\x03\x04" + struct.pack("<HHHHHLLLHH", 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name
        size = len(local) + 46 + len(name) + 22
        entry = b"PK\x01\x02" + struct.pack(
            "<HHHHHHLLLHHHHHLL", 20, 20, 0, 0, 0, 0, 0, size, size, len(name), 0, 0, 0, 0, 0, 0
        )
        end = b"PK\x05\x06" + struct.pack("<HHHHLLH", 0, 0, 1, 1, 46 + len(name), len(local), 0)
        (row,) = expand([put("r.zip", local + entry + name + end)], LIMITS)
        assert "is an archive within the zip" in row.error

    @pytest.mark.parametrize("cut", [4, 22, 60, -1, -22, -40])
    def test_a_cut_one(self, pack, put, cut):
        rows = expand([put("cut.zip", pack(("a.png", encoded())).read_bytes()[:cut])], LIMITS)
        assert len(rows) == 1 and "'cut.zip' is damaged or not a zip" in rows[0].error

    def test_damage_anywhere_ends_in_a_sentence(self, pack, put):
        whole = pack(("a.png", encoded(picture((9, 9)))), ("b.jpg", encoded(picture((9, 9)), "JPEG"))).read_bytes()
        random = np.random.default_rng(0)
        for _ in range(300):
            data = bytearray(whole)
            for place in random.integers(0, len(data), 3):
                data[place] = random.integers(0, 256)
            path = put("damaged.zip", bytes(data))
            for row in expand([path], LIMITS):
                try:
                    row.load()
                except ValueError as error:
                    assert str(path.parent) not in str(error)
