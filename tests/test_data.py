"""Pictures in: every kind that should load, every kind that should not, folders and augmentation."""

import math
import os
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from anomalysd_pipeline.data import listing
from anomalysd_pipeline.data.datasets import load_mask
from anomalysd_pipeline.data.images import FORMATS, common_depth, load_image, load_images, load_pictures
from anomalysd_pipeline.data.listing import list_images
from anomalysd_pipeline.data.picture import Picture
from anomalysd_pipeline.data.tensors import augment, to_tensor

from .hostile_files import encoded, lost_color, mutated, ordinary_files, packed_tiff, tiff_tags, with_chunk


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def picture(width=20, height=12):
    """An RGB picture without any symmetry: gradients, and a red block at the top left."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 1] = np.linspace(0, 255, width).astype(np.uint8)
    pixels[..., 2] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    pixels[:3, :5] = (255, 0, 0)
    return Image.fromarray(pixels)


def pixels_of(source):
    image = load_image(source)
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    return np.asarray(image)


class TestLoadImageFiles:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "gif", "jpg", "PNG"])
    def test_formats(self, tmp_path, suffix):
        path = tmp_path / f"part.{suffix}"
        picture().quantize(16).convert("RGB").save(path, **({"lossless": True} if suffix == "webp" else {}))
        expected = np.asarray(picture().quantize(16).convert("RGB")).astype(int)
        assert np.abs(pixels_of(path) - expected).mean() < (12 if suffix == "jpg" else 0.5)
        assert np.array_equal(pixels_of(str(path)), pixels_of(path))

    def test_format_is_read_from_the_content(self, tmp_path):
        picture().save(tmp_path / "part.png", format="BMP")
        assert np.array_equal(pixels_of(tmp_path / "part.png"), np.asarray(picture()))

    @pytest.mark.parametrize("orientation, turns", [(3, 2), (6, 3), (8, 1)])
    def test_exif_rotation(self, tmp_path, orientation, turns):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture().save(tmp_path / "phone.png", exif=exif)
        assert np.array_equal(pixels_of(tmp_path / "phone.png"), np.rot90(np.asarray(picture()), turns))

    def test_broken_exif_is_ignored(self, tmp_path):
        picture().save(tmp_path / "part.jpg", exif=b"Exif\0\0no exif at all")
        assert pixels_of(tmp_path / "part.jpg").shape == (12, 20, 3)

    @pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
    def test_animation_gives_its_first_frame(self, tmp_path, suffix):
        red, *others = (Image.new("RGB", (16, 16), color) for color in ("red", "blue", "green"))
        red.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others)
        assert np.abs(pixels_of(tmp_path / f"a.{suffix}") - np.array([255, 0, 0])).max() <= 3

    def test_palette_with_transparency(self, tmp_path):
        image = Image.new("P", (10, 10), 0)
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.paste(1, (5, 0, 10, 10))
        image.save(tmp_path / "p.png", transparency=0)
        loaded = pixels_of(tmp_path / "p.png")
        assert (loaded[:, :5] == 255).all() and (loaded[:, 5:] == (0, 0, 255)).all()

    @pytest.mark.parametrize("suffix", ["png", "tiff"])
    def test_16_bit_gray(self, tmp_path, suffix):
        values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
        Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
        assert np.array_equal(pixels_of(tmp_path / f"deep.{suffix}")[..., 0], np.rint(values / 65535 * 255))
        Image.fromarray(values // 1000).save(tmp_path / f"dark.{suffix}")
        assert np.array_equal(pixels_of(tmp_path / f"dark.{suffix}")[..., 1], values // 1000)

    @pytest.mark.parametrize("depth", [10, 12, 14])
    def test_16_bit_files_of_fewer_bits(self, tmp_path, depth, caplog):
        gray = np.random.default_rng(0).integers(0, 256, (24, 24), np.uint16)
        gray[0, 0] = 255
        deep = (gray * ((2**depth - 1) / 255)).round().astype(np.uint16)
        Image.fromarray(deep).save(tmp_path / "deep.png")
        for source in (tmp_path / "deep.png", deep, Image.fromarray(deep)):
            caplog.clear()
            assert np.array_equal(pixels_of(source)[..., 0], gray)
            assert f"looks like {depth} bits" in caplog.text and "`bit_depth`" in caplog.text
            caplog.clear()
            assert load_image(source, depth).info["bit_depth"] == depth and not caplog.text
        assert load_image(deep, 16).getextrema()[0][1] == round((2**depth - 1) / 257)

    def test_files_that_tell_their_depth(self, tmp_path, caplog):
        values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 10
        expected = np.rint(values * (255 / 4095)).astype(np.uint8)
        ome = '<OME><Image><Pixels ID="Pixels:0" Type="uint16" SignificantBits="12"/></Image></OME>'
        Image.fromarray(values).save(tmp_path / "ome.tif", description=ome)
        (tmp_path / "packed.tif").write_bytes(packed_tiff(values))
        (tmp_path / "sbit.png").write_bytes(with_chunk(encoded(Image.fromarray(values)), b"sBIT", b"\x0c"))
        for name in ("ome.tif", "packed.tif", "sbit.png"):
            assert np.array_equal(pixels_of(tmp_path / name)[..., 0], expected), name
            # What the file tells goes first.
            assert np.array_equal(np.asarray(load_image(tmp_path / name, 14))[..., 0], expected)
        scaled = encoded(Image.fromarray(values * 100))  # as the standard of PNG has it: scaled to 16 bits
        (tmp_path / "scaled.png").write_bytes(with_chunk(scaled, b"sBIT", b"\x0c"))
        assert np.array_equal(pixels_of(tmp_path / "scaled.png")[..., 0], np.rint(values / 655.35 * 255))
        assert not caplog.text

    def test_pictures_of_one_part_have_one_depth(self, tmp_path, caplog):
        """A dark one among them is no 8-bit picture."""
        for name, highest in (("dark", 200), ("bright", 4000)):
            Image.fromarray(np.full((8, 8), highest, np.uint16)).save(tmp_path / f"{name}.tif")
        picture().save(tmp_path / "eight.png")
        paths = [tmp_path / "dark.tif", tmp_path / "bright.tif", tmp_path / "eight.png"]
        assert common_depth([*paths, tmp_path / "nowhere.png"]) == 12 and common_depth(paths[2:]) is None
        assert [image.getpixel((0, 0))[0] for _, image in load_images(paths)] == [12, 249, 255]
        assert [image.getpixel((0, 0))[0] for image in load_pictures(paths, "image")] == [12, 249, 255]
        assert pixels_of(paths[0]).max() == 200
        with pytest.raises(ValueError, match="bright.tif' has gray values up to 4000, but its 10 bits end at 1023"):
            load_image(paths[1], 10)
        for depth in (7, 17, 12.0, True):
            with pytest.raises(ValueError, match="^`bit_depth` must be a whole number from 8 to 16"):
                load_pictures(paths, "image", depth)

    def test_one_bit(self, tmp_path):
        Image.fromarray(np.eye(9, dtype=bool)).save(tmp_path / "bits.png")
        assert np.array_equal(pixels_of(tmp_path / "bits.png")[..., 2], np.eye(9) * 255)


class TestLoadImageObjects:
    def test_transparency_lies_on_white(self):
        image = picture().convert("RGBA")
        image.putalpha(Image.new("L", image.size, 51))
        expected = np.asarray(picture()) * 0.2 + 255 * 0.8
        assert np.abs(pixels_of(image) - expected).max() <= 1
        gray = Image.merge("LA", [Image.new("L", (8, 8), 100), Image.new("L", (8, 8), 0)])
        assert (pixels_of(gray) == 255).all()

    def test_cmyk(self):
        ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
        assert (pixels_of(ink) == (255, 0, 0)).all()

    @pytest.mark.parametrize("top", [1.0, 255.0])
    def test_float_mode(self, top):
        values = np.linspace(0, top, 64, dtype=np.float32).reshape(8, 8)
        assert np.array_equal(pixels_of(Image.fromarray(values))[..., 0], np.rint(values / top * 255))

    def test_input_is_left_alone(self):
        image = picture().convert("P")
        before = image.tobytes()
        result = load_image(image)
        result.paste((1, 2, 3), (0, 0, 20, 12))
        assert image.mode == "P" and image.tobytes() == before

    def test_arrays(self):
        pixels = np.asarray(picture())
        assert np.array_equal(pixels_of(pixels), pixels)
        assert np.array_equal(pixels_of(pixels.astype(np.uint16) * 257), pixels)
        assert np.array_equal(pixels_of(pixels / 255), pixels)
        assert np.array_equal(pixels_of((pixels / 255).astype(np.float32)), pixels)
        assert np.array_equal(pixels_of(pixels[..., 1])[..., 0], pixels[..., 1])
        assert np.array_equal(pixels_of(pixels[..., 1:2])[..., 2], pixels[..., 1])
        alpha = np.full_like(pixels[..., :1], 255)
        alpha[:, :5] = 0
        loaded = pixels_of(np.concatenate([pixels, alpha], -1))
        assert (loaded[:, :5] == 255).all() and np.array_equal(loaded[:, 5:], pixels[:, 5:])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
    def test_tensors(self, dtype):
        pixels = torch.tensor(np.asarray(picture())).permute(2, 0, 1)
        tensor = pixels if dtype == torch.uint8 else (pixels / 255).to(dtype).requires_grad_()
        for given in (tensor, tensor[None]):
            assert np.abs(pixels_of(given).astype(int) - np.asarray(picture())).max() <= (dtype == torch.bfloat16)

    @pytest.mark.parametrize(
        "source, sentence",
        [
            (np.full((8, 8), np.nan), "NaN"),
            (np.full((8, 8, 3), np.inf, np.float32), "infinite"),
            (np.full((8, 8), -1.0), r"scale them to \[0, 1\]"),
            (np.full((8, 8), 200.0), r"scale them to \[0, 1\]"),
            (np.zeros((3, 20, 20)), r"\[H, W, 3\]"),
            (np.zeros((20, 20, 2)), r"\[H, W, 3\]"),
            (np.zeros(20), r"\[H, W\]"),
            (np.zeros((2, 20, 20, 3)), r"\[H, W, 3\]"),
            (np.zeros((20, 20), np.int64), "int64"),
            (np.zeros((4, 20), np.uint8), "20 x 4"),
            (np.zeros((0, 0, 3)), "0 x 0"),
            (np.broadcast_to(np.uint8(0), (30000, 30000)), "megapixels"),
            (torch.zeros(20, 20, 3), r"\[3, H, W\]"),
            (torch.zeros(2, 3, 20, 20), r"\[3, H, W\]"),
            (torch.full((3, 20, 20), torch.nan), "NaN"),
            (torch.full((3, 20, 20), -1.0), r"\[0, 1\]"),
            (Image.new("RGB", (1, 1)), "1 x 1"),
            (Image.new("L", (100, 7)), "100 x 7"),
            (Image.new("1", (10001, 10000)), "megapixels"),
            (Image.fromarray(np.full((8, 8), np.nan, np.float32)), "NaN"),
            (Image.fromarray(np.full((8, 8), 300, np.float32)), r"\[0, 255\]"),
            (Image.fromarray(np.full((8, 8), 70000, np.int32)), r"\[0, 65535\]"),
            (None, "NoneType"),
            (7, "int"),
        ],
    )
    def test_bad_objects(self, source, sentence):
        with pytest.raises(ValueError, match="^`source`.*" + sentence):
            load_image(source)


class TestLoadImageBadFiles:
    def refuses(self, path, sentence):
        with pytest.raises(ValueError, match=sentence) as caught:
            load_image(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    def test_missing(self, tmp_path):
        self.refuses(tmp_path / "nowhere.png", "does not exist")
        self.refuses(tmp_path / ("x" * 500), "does not exist")

    def test_folder(self, tmp_path):
        self.refuses(tmp_path, "is a folder")

    def test_text_named_png(self, tmp_path):
        (tmp_path / "text.png").write_text("no picture")
        self.refuses(tmp_path / "text.png", "not a picture")

    def test_empty_file(self, tmp_path):
        (tmp_path / "empty.jpg").touch()
        self.refuses(tmp_path / "empty.jpg", "not a picture")

    def test_other_formats_are_not_opened(self, tmp_path):
        picture().save(tmp_path / "page.eps")
        self.refuses(tmp_path / "page.eps", "not a picture in a format we read")

    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff", "gif"])
    @pytest.mark.parametrize("share", [0.5, 0.9])
    def test_truncated(self, tmp_path, suffix, share):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        self.refuses(path, "damaged")

    def test_one_pixel(self, tmp_path):
        Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
        self.refuses(tmp_path / "dot.png", "1 x 1 pixels")

    @pytest.mark.parametrize("size", [(30000, 30000), (10001, 10000)])
    def test_too_many_pixels(self, tmp_path, size):
        # Only the header is true: what is refused by its header need not be there.
        header = tmp_path / "small.png"
        Image.new("1", (16, 16)).save(header)
        content = bytearray(header.read_bytes())
        content[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
        path = tmp_path / "huge.png"
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        path.write_bytes(content)
        self.refuses(path, "more than 100 megapixels")

    def test_mutated_files_give_a_picture_or_a_sentence(self, tmp_path):
        chance, outcomes = np.random.default_rng(7), []
        path = tmp_path / "any.png"
        for number, whole in enumerate(ordinary_files() * 12):
            content = mutated(whole, chance)
            path.write_bytes(content)
            readers = (
                lambda: load_image(path),
                lambda: load_mask(path, 16),
                Picture("any", "a", "s", 0, 0, content).load,
            )
            for reader in readers:
                try:
                    reader()
                    outcomes.append(True)
                except ValueError as error:
                    assert str(error).startswith("`") and "\n" not in str(error), number
                    outcomes.append(False)
            common_depth([path])
        assert len(outcomes) > 600 and 0.1 < np.mean(outcomes) < 0.9

    def test_a_transparent_color_that_the_palette_lacks(self, tmp_path):
        (tmp_path / "lost.png").write_bytes(lost_color())
        self.refuses(tmp_path / "lost.png", "`source`.*damaged and has no colors")

    def test_a_text_in_the_file_is_no_depth(self, tmp_path):
        info = PngInfo()
        info.add_text("bit_depth", "12")
        for image in (picture(), Image.fromarray(np.full((8, 8), 60000, np.uint16))):
            image.save(tmp_path / "text.png", pnginfo=info)
            assert load_image(tmp_path / "text.png").info.get("bit_depth") in (None, 16)

    @pytest.mark.parametrize("side", [2048, 32768, 65535])
    def test_a_tile_far_larger_than_its_picture(self, tmp_path, side):
        path = tmp_path / "tile.tif"
        path.write_bytes(tiff_tags(32, 32, w=side, h=side))
        self.refuses(path, "tiles far larger than itself")
        with Image.open(path) as unread, pytest.raises(ValueError, match="^`source`.*far larger than itself"):
            load_image(unread)

    def test_tiles_a_little_larger_than_the_picture(self, tmp_path):
        # 40 x 24 in one tile of 256 x 256, as scanners write them.
        pixels = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)
        path = tmp_path / "tiled.tif"
        path.write_bytes(tiff_tags(40, 24, w=256, h=256, data=zlib.compress(pixels.tobytes())))
        assert np.array_equal(pixels_of(path)[..., 0], pixels[:24, :40])


class TestLists:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("b.png", "a/z.JPG", "a-1.tif", "a/.hidden.png", ".cache/c.png", "notes.txt", "B.webp"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    def test_folder_sorted_by_relative_path_as_text(self, folder):
        names = [path.relative_to(folder).as_posix() for path in list_images(folder)]
        assert names == ["B.webp", "a-1.tif", "a/z.JPG", "b.png"]

    def test_a_hidden_parent_does_not_hide_the_folder(self, folder):
        assert list_images(folder / ".cache") == [folder / ".cache" / "c.png"]

    def test_files_and_lists(self, folder):
        assert list_images(str(folder / "notes.txt")) == [folder / "notes.txt"]
        twice = list_images([folder / "b.png", folder / "a", folder / "b.png"])
        assert twice == [folder / "b.png", folder / "a/z.JPG"]

    def test_what_is_left_out_is_told(self, folder, caplog, monkeypatch):
        monkeypatch.setattr(listing, "SUFFIXES", tuple(s for s in listing.SUFFIXES if not s.startswith(".he")))
        picture().save(folder / "pages.tif", save_all=True, append_images=[picture(), picture()])
        picture().save(folder / "web.jfif", "JPEG")
        for name in ("phone.HEIC", "more.heic", "bare", "results/heatmaps/1.png", "mine/1.png"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        (folder / "results" / "run.json").write_text('{"facts": {}, "given": {}}')
        (folder / "mine" / "run.json").write_text('["of another program"]')
        told = []
        names = [path.relative_to(folder).as_posix() for path in list_images(folder, told.append)]
        assert names == ["B.webp", "a-1.tif", "a/z.JPG", "b.png", "mine/1.png", "pages.tif", "web.jfif"]
        (sentence,) = told
        assert sentence.startswith(f"`source` '{folder}': left out files of other types (2 .heic, 1 ")
        assert all(kind in sentence for kind in ("1 without suffix", "1 .json", "1 .txt"))
        assert (
            "of which HEIC is read after `pip install pillow-heif`; results of an inspection in folders (1)"
            in sentence
        )
        assert sentence.endswith("; further pages (2) of TIFF files (1), whose first pages are read.")
        assert list_images(folder, skip=folder / "results") == list_images(folder)
        assert "left out files" in caplog.text  # said without anyone who asks for it, too
        with pytest.raises(ValueError, match="results' holds results of an inspection; give the folder of the"):
            list_images([folder / "results"])

    @pytest.mark.skipif(not hasattr(os, "symlink"), reason="links to folders")
    def test_linked_folders_are_followed_once(self, folder, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        picture().save(elsewhere / "far.png")
        for name, target in (("0", elsewhere), ("1", elsewhere), ("2", folder / "a"), ("3", folder), ("4", "gone")):
            (folder / name).symlink_to(target, target_is_directory=True)
        (elsewhere / "back").symlink_to(folder, target_is_directory=True)
        names = [path.relative_to(folder).as_posix() for path in list_images(folder)]
        assert names == ["0/far.png", "B.webp", "a-1.tif", "a/z.JPG", "b.png"]

    def test_heic(self, tmp_path):
        head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
        (tmp_path / "phone.jpg").write_bytes(head)
        if "HEIF" in FORMATS:
            picture(64, 48).save(tmp_path / "phone.heic", quality=95)
            assert np.abs(pixels_of(tmp_path / "phone.heic") - np.asarray(picture(64, 48)).astype(int)).mean() < 5
            assert list_images(tmp_path) == [tmp_path / "phone.heic", tmp_path / "phone.jpg"]
        else:
            with pytest.raises(ValueError, match="phone.jpg' is a HEIC picture; run `pip install pillow-heif`"):
                load_image(tmp_path / "phone.jpg")

    def test_nothing_to_list(self, folder):
        (folder / "empty").mkdir()
        for source in (folder / "empty", []):
            with pytest.raises(ValueError, match="`source`.*no pictures"):
                list_images(source)
        with pytest.raises(ValueError, match="`source`.*nowhere.*does not exist"):
            list_images(folder / "nowhere")

    def test_load_images_reports_or_raises(self, folder):
        picture().save(folder / "good.png")
        reported = []
        loaded = load_images([folder / "b.png", folder / "good.png"], lambda *facts: reported.append(facts))
        assert [path for path, _ in loaded] == [folder / "good.png"]
        assert np.array_equal(loaded[0][1], picture())
        assert [path for path, _ in reported] == [folder / "b.png"] and str(folder / "b.png") in reported[0][1]
        with pytest.raises(ValueError, match="b.png"):
            load_images([folder / "b.png", folder / "good.png"])


class TestTensors:
    def test_range_and_layout(self):
        tensor = to_tensor(picture(), (12, 20))
        assert tensor.dtype == torch.float32 and tensor.shape == (3, 12, 20)
        expected = np.asarray(picture()).transpose(2, 0, 1) / 255 * 2 - 1
        np.testing.assert_allclose(tensor, expected, atol=1e-6)

    def test_shrinking_antialiases(self):
        stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32))).convert("RGB")
        tensor = to_tensor(stripes, 8)
        assert tensor.shape == (3, 8, 8) and tensor[:, :, 1:-1].abs().max() < 0.05

    def test_needs_rgb(self):
        with pytest.raises(ValueError, match="`image`.*mode L"):
            to_tensor(Image.new("L", (9, 9)), 8)


class TestAugment:
    still = {"brightness": 0.0, "contrast": 0.0, "scale": 0.0, "degrees": 0.0}

    def draws(self, seed):
        return (torch.rand(4, generator=torch.Generator().manual_seed(seed)) * 2 - 1).tolist()

    def run(self, image, seed, **limits):
        return augment(image, torch.Generator().manual_seed(seed), **{**self.still, **limits})

    def test_without_limits_nothing_changes(self):
        image = to_tensor(picture(), (12, 20))
        torch.testing.assert_close(self.run(image, 0), image, atol=1e-5, rtol=0)

    def test_brightness_and_contrast(self):
        image = to_tensor(picture(), (12, 20)) * 0.5
        shift, gain, *_ = self.draws(1)
        torch.testing.assert_close(self.run(image, 1, brightness=0.1), image + 0.2 * shift, atol=1e-5, rtol=0)
        expected = image.mean() + (1 + 0.3 * gain) * (image - image.mean())
        torch.testing.assert_close(self.run(image, 1, contrast=0.3), expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("shape", [(64, 64), (48, 96)])
    def test_scale_and_rotation_move_a_blob_as_computed(self, shape):
        height, width = shape
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        dy, dx = 8.0, 11.0
        blob = torch.exp(-((y - height / 2 - dy) ** 2 + (x - width / 2 - dx) ** 2) / 8)
        image = (2 * blob - 1).expand(3, -1, -1)
        *_, zoom, turn = self.draws(4)
        weight = (self.run(image, 4, scale=0.3, degrees=40.0)[0] + 1) / 2
        weight *= (y - height / 2) ** 2 + (x - width / 2) ** 2 < 20**2  # reflections of the blob lie beyond
        center = [(weight * axis).sum().item() / weight.sum().item() for axis in (y - height / 2, x - width / 2)]
        radius, angle = math.hypot(dx, dy) * (1 + 0.3 * zoom), math.radians(40 * turn)
        turned = math.atan2(*center) - math.atan2(dy, dx)
        assert math.hypot(*center) == pytest.approx(radius, abs=0.1)
        assert abs(turned) == pytest.approx(abs(angle), abs=0.02)

    def test_corners_are_filled_with_the_picture_reflected(self):
        image = torch.full((3, 32, 32), 0.7)
        torch.testing.assert_close(self.run(image, 2, degrees=45.0, scale=0.5), image, atol=1e-5, rtol=0)

    def test_seeded_and_in_range(self):
        image = to_tensor(picture(), 16)
        first, again, other = (augment(image, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)
        bright = augment(torch.ones(3, 8, 8), torch.Generator().manual_seed(0), brightness=2.0)
        assert bright.shape == (3, 8, 8) and bright.abs().max() <= 1

    @pytest.mark.parametrize("shape, scale", [((1, 3, 8, 8), 0.1), ((1, 8, 8), 0.1), ((3, 8, 8), 1.0)])
    def test_bad_arguments(self, shape, scale):
        with pytest.raises(ValueError, match="`image`|`scale`"):
            augment(torch.zeros(shape), torch.Generator(), scale=scale)


class TestOddColors:
    @pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
    @pytest.mark.parametrize("transparency", ["red", 5.5, [1], None, 10**9])
    def test_transparency_that_is_none_is_one_sentence(self, tmp_path, mode, transparency):
        image = Image.new(mode, (16, 16))
        image.info["transparency"] = transparency
        if transparency == 10**9 and mode != "P":
            return  # a color that no pixel has
        with pytest.raises(ValueError, match="^`source`, a PIL image, is damaged and has no colors .*; copy it anew"):
            load_image(image)

    def test_a_file_whose_palette_lacks_the_transparent_color_is_named(self, tmp_path):
        def chunk(kind, content):
            return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

        header = b"".join(length.to_bytes(4, "big") for length in (16, 16)) + bytes([8, 3, 0, 0, 0])
        chunks = {
            b"IHDR": header,
            b"PLTE": bytes(range(6)),
            b"tRNS": b"\xff" * 300 + b"\0",
            b"IDAT": zlib.compress(bytes(17 * 16)),
            b"IEND": b"",
        }
        path = tmp_path / "part.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks.items()))
        with pytest.raises(ValueError, match="^`source` '.*part.png' is damaged and has no colors .palette index"):
            load_image(path)

    def test_premultiplied_gray(self):
        assert (pixels_of(Image.new("La", (16, 16))) == 255).all()

    @pytest.mark.parametrize(
        ("tensor", "kind"),
        [
            (torch.empty(3, 16, 16, device="meta"), "a meta"),
            (torch.zeros(3, 16, 16).to_sparse(), "a sparse"),
            (torch.quantize_per_tensor(torch.zeros(3, 16, 16), 0.1, 0, torch.quint8), "a quantized"),
        ],
    )
    def test_tensors_without_plain_values(self, tensor, kind):
        with pytest.raises(ValueError, match=f"^`source` is {kind} tensor of shape .3, 16, 16."):
            load_image(tensor)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the memory of a forked process is measured")
@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "I;16", "I", "F"])
def test_memory_of_large_pictures(tmp_path, mode):
    """At most 11 bytes for each pixel, which is a gigabyte at the 100 megapixels that are allowed."""
    import resource

    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}.get(mode)
    image = Image.new(mode, (4000, 4000)) if dtype is None else Image.fromarray(np.ones((4000, 4000), dtype))
    image.save(tmp_path / "part.tif")
    del image
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        load_image(tmp_path / "part.tif")
        os.write(write, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    kibibytes = int(os.read(read, 100))
    assert kibibytes * 1024 < 11 * 4000 * 4000
