"""Safe loading of pictures from files, folders, arrays and tensors."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH
from torch import Tensor

from .depth import KEY, check_bit_depth, is_deep, scale_of, settle, tagged_depth
from .pixels import RESAVE, extremes, flatten, to_bytes

MIN_SIDE = 8
MAX_PIXELS = 100_000_000
LARGEST_TILE = 4_000_000
"""Most pixels of a TIFF's tile that exceeds its picture; a decoder makes room for a whole tile."""
SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Pillow knows dozens of formats, and some of them start other programs (EPS); an upload may only reach these decoders.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
with contextlib.suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()
    FORMATS, SUFFIXES = (*FORMATS, "HEIF"), (*SUFFIXES, ".heic", ".heif")


def load_image(source, bit_depth: int | None = None) -> Image.Image:
    """Turns a file, PIL image, array or tensor into an 8-bit RGB PIL image.

    Args:
        source: either
            - a path to a BMP, GIF, JPEG, PNG, TIFF or WebP file, recognized by its content and not by its suffix;
            - a PIL image of any mode;
            - a NumPy array `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or `[H, W, 4]`: uint8, uint16, or float in [0, 1];
            - a tensor `[C, H, W]` or `[1, C, H, W]` with 1, 3 or 4 channels, of the same types and ranges.
        bit_depth: bits that are in use in 16-bit gray and uint16, from 8 to 16, where the file's tags do not tell (see
            `depth.tagged_depth`); None: the smallest of 8, 10, 12, 14 and 16 that hold the largest value.

    The rotation noted in EXIF is applied, an animation gives its first frame, and transparency is laid over white.
    A PIL image of mode `F` is read as [0, 1] where no value exceeds 1, and as [0, 255] otherwise.

    Returns:
        A new image in mode RGB, with the depth of 16-bit gray as `info["bit_depth"]`. It has at least 8 x 8 pixels and
        at most `MAX_PIXELS` (100 megapixels). The size is checked before decoding, and so are the tiles of a TIFF:
        none may exceed both its picture and `LARGEST_TILE`.

    Raises:
        ValueError: the source is missing, a folder, damaged, no picture, too small, too large, of a wrong shape or
            type, or holds values that are not finite or out of range; the sentence names the source and the remedy.
    """
    if isinstance(source, Image.Image):
        return flatten(_decode(source, "`source`, a PIL image,"), "`source`, a PIL image,", "white", bit_depth)
    if isinstance(source, (str, os.PathLike)):
        name = f"`source` '{os.fspath(source)}'"
        return flatten(open_image(source, name), name, "white", bit_depth)
    if isinstance(source, torch.Tensor):
        return _from_array(_channels_last(source), f"`source`, a tensor of shape {list(source.shape)},", bit_depth)
    if isinstance(source, np.ndarray):
        return _from_array(source, f"`source`, an array of shape {list(source.shape)},", bit_depth)
    raise ValueError(
        f"`source` is a {type(source).__name__}; give a path, a PIL image, a NumPy array or a torch tensor instead."
    )


def open_image(path: str | os.PathLike, name: str) -> Image.Image:
    """Decodes a file's first frame with the checks of `load_image`: upright, in the mode of the file.

    Args:
        path: a picture file.
        name: its name in errors, such as "`path` 'mask.png'".

    Raises:
        ValueError: as `load_image`.
    """
    with _open(path, name) as image:
        return _decode(image, name)


def _open(path: str | os.PathLike, name: str) -> Image.Image:
    """Opens a file and reads its header only."""
    if os.path.isdir(path):
        raise ValueError(f"{name} is a folder; give a picture file, or list the folder with `list_images`.")
    if not os.path.isfile(path):
        raise ValueError(f"{name} does not exist; check the path and its spelling.")
    with warnings.catch_warnings():
        # Pillow warns about large and odd headers on stderr; our own sentences tell the faults that matter.
        warnings.simplefilter("ignore")
        try:
            return Image.open(path, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(_too_large(name)) from error
        except UnidentifiedImageError as error:
            with open(path, "rb") as file:
                raise ValueError(unidentified(name, file.read(12))) from error
        except PermissionError as error:
            raise ValueError(f"{name} may not be read by this user; change its permissions.") from error
        # Decoders raise nearly every kind of exception over damaged bytes: OSError, SyntaxError, struct.error, ...
        except Exception as error:
            raise ValueError(f"{name} is damaged and cannot be read ({error}); copy it anew, or {RESAVE}.") from error


def unidentified(name: str, head: bytes) -> str:
    """Words that no decoder takes a file, by its first 12 bytes; `name` begins the sentence."""
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1") and "HEIF" not in FORMATS:
        return f"{name} is a HEIC picture; run `pip install pillow-heif` to have it read, or save it as a PNG or JPEG."
    return f"{name} is damaged or not a picture in a format we read (BMP, GIF, JPEG, PNG, TIFF, WebP); {RESAVE}."


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Checks the size before decoding, then decodes the current frame and turns it upright."""
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ValueError(_too_small(name, width, height))
    if width * height > MAX_PIXELS:
        raise ValueError(_too_large(name, f" ({width} x {height})"))
    if _tile_pixels(image, name) > max(LARGEST_TILE, width * height):
        raise ValueError(f"{name} is stored in tiles far larger than itself; save it again as a PNG or JPEG.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            depth = tagged_depth(image)
            upright = ImageOps.exif_transpose(image)
            if type(upright.info.get(KEY)) is not int:  # a text of that name in the file
                upright.info.pop(KEY, None)
            if depth is not None:
                upright.info[KEY] = depth
            return upright
        except Image.DecompressionBombError as error:
            raise ValueError(_too_large(name)) from error
        except Exception as error:
            raise ValueError(
                f"{name} is cut short or damaged and cannot be decoded ({error}); copy it anew, or {RESAVE}."
            ) from error


def upright_size(path: str | os.PathLike, name: str) -> tuple[int, int]:
    """Reads width and height of a picture as it is after the rotation noted in EXIF, from its header alone.

    Raises:
        ValueError: as `load_image`.
    """
    with _open(path, name) as image:
        try:
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        except Exception:  # what is wrong with EXIF data is no fault of a picture
            turned = False
        return image.size[::-1] if turned else image.size


def count_pages(path: str | os.PathLike) -> int:
    """Counts the pages or frames of a picture file; 1 where they cannot be counted."""
    try:
        with _open(path, "") as image, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(image, "n_frames", 1)
    except Exception:  # decoding meets the fault again, and tells it
        return 1


def _tile_pixels(image: Image.Image, name: str) -> int:
    """Counts the pixels of a TIFF's tile, as its header claims; 0 for pictures without tiles."""
    tags = getattr(image, "tag_v2", {})
    try:
        return int(tags.get(TILEWIDTH, 0)) * int(tags.get(TILELENGTH, 0))
    except (TypeError, ValueError) as error:  # several numbers, or none
        raise ValueError(f"{name} is damaged: its tiles have no size; copy it anew, or {RESAVE}.") from error


def _too_small(name: str, width: int, height: int) -> str:
    return (
        f"{name} has {width} x {height} pixels (width x height); a picture needs at least {MIN_SIDE} x {MIN_SIDE}, "
        "so give a larger one."
    )


def _too_large(name: str, size: str = "") -> str:
    return f"{name} has more than {MAX_PIXELS // 1_000_000} megapixels{size}; scale it down or cut out the part."


def _channels_last(tensor: torch.Tensor) -> np.ndarray:
    """Converts a tensor `[C, H, W]` or `[1, C, H, W]` to an array `[H, W, C]`."""
    if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
        kind = "a meta" if tensor.is_meta else "a quantized" if tensor.is_quantized else "a sparse"
        raise ValueError(
            f"`source` is {kind} tensor of shape {list(tensor.shape)}; give one that holds all values, such as "
            "`dequantize()` and `to_dense()` return."
        )
    plane = tensor.detach().cpu()
    if plane.ndim == 4 and plane.shape[0] == 1:
        plane = plane[0]
    if plane.ndim != 3 or plane.shape[0] not in (1, 3, 4):
        raise ValueError(
            f"`source` is a tensor of shape {list(tensor.shape)}; give [3, H, W] or [1, 3, H, W] in [0, 1]."
        )
    if plane.is_floating_point():
        plane = plane.float()  # NumPy has no bfloat16
    return plane.permute(1, 2, 0).numpy()


def _from_array(array: np.ndarray, name: str, bit_depth: int | None) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"{name} is no picture; give [H, W], [H, W, 3] or [H, W, 4] (a tensor: [3, H, W]).")
    height, width = array.shape[:2]
    if min(width, height) < MIN_SIDE:
        raise ValueError(_too_small(name, width, height))
    if width * height > MAX_PIXELS:
        raise ValueError(_too_large(name))
    depth = None
    if np.issubdtype(array.dtype, np.floating):
        low, high = extremes([array], name)
        # Resizing and float rounding overshoot a little; a picture in [-1, 1] or [0, 255] overshoots by far.
        if low < -0.01 or high > 1.01:
            raise ValueError(f"{name} has float values from {low:g} to {high:g}; scale them to [0, 1], or give uint8.")
        image = to_bytes(array, lambda rows: rows.clip(0, 1) * 255)
    elif array.dtype == np.uint16:
        factor, depth = scale_of(*extremes([array], name), name, bit_depth)
        image = to_bytes(array, lambda rows: rows * factor)
    elif array.dtype == np.uint8:
        image = Image.fromarray(np.ascontiguousarray(array))
    else:
        raise ValueError(f"{name} has type {array.dtype}; give uint8, uint16, or float in [0, 1].")
    image = flatten(image, name, "white")
    if depth is not None:
        image.info[KEY] = depth
    return image


def load_images(
    paths: Iterable[str | os.PathLike],
    on_error: Callable[[Path, str], None] | None = None,
    bit_depth: int | None = None,
) -> list[tuple[Path, Image.Image]]:
    """Loads pictures with `load_image`, in order.

    Args:
        paths: picture files.
        on_error: called with path and sentence of each picture that cannot be loaded, which is then skipped; without
            it the first such picture raises.
        bit_depth: see `load_image`; None: one for all, see `common_depth`.

    Returns:
        Pairs of path and RGB image.

    Raises:
        ValueError: a picture cannot be loaded and there is no `on_error`.
    """
    loaded, paths = [], list(map(Path, paths))
    bit_depth = bit_depth or common_depth(paths)
    for path in paths:
        try:
            loaded.append((path, load_image(path, bit_depth)))
        except ValueError as error:
            if on_error is None:
                raise
            on_error(path, str(error))
    return loaded


def load_pictures(images, name: str, bit_depth: int | None = None) -> list[Image.Image]:
    """Loads a picture, or a list of pictures, of any kind that `load_image` takes.

    Args:
        images: one or several; an array or tensor with a leading batch dimension counts as several.
        name: the argument's name in errors.
        bit_depth: see `load_image`; None: one for all, see `common_depth`.

    Returns:
        RGB images.

    Raises:
        ValueError: there is no picture, or a picture cannot be read.
    """
    check_bit_depth(bit_depth)
    if isinstance(images, (np.ndarray, Tensor)):
        images = [images] if images.ndim < 4 else list(images)
    elif not isinstance(images, (list, tuple)):
        images = [] if images is None else [images]
    if not images:
        raise ValueError(f"`{name}` must be a picture or a list with at least one.")
    bit_depth = bit_depth or common_depth(images)
    return [load_image(image, bit_depth) for image in images]


def common_depth(sources: Iterable) -> int | None:
    """Finds one depth for all 16-bit gray among pictures: two of a part must not be read as different ones.

    Args:
        sources: as of `load_image`; others, and pictures that cannot be read, say nothing.

    Returns:
        What their files tell, see `depth.tagged_depth`, else the smallest of 8, 10, 12, 14 and 16 bits that hold the
        largest value of all, with a warning for 10, 12 and 14; None where there is no 16-bit gray.
    """
    told, highest = [], []
    for source in sources:
        if isinstance(source, torch.Tensor):
            source = source.detach().cpu().numpy() if source.dtype == torch.uint16 else None
        if isinstance(source, np.ndarray) and source.dtype == np.uint16 and source.size:
            highest.append(source.max())
        elif isinstance(source, (str, os.PathLike, Image.Image)):
            try:
                with contextlib.nullcontext(source) if isinstance(source, Image.Image) else _open(source, "") as image:
                    if is_deep(image):  # others are not decoded for this
                        upright = _decode(image, "")
                        told += [upright.info[KEY]] if KEY in upright.info else []
                        highest.append(np.asarray(upright).max())
            except ValueError:
                continue
    return settle(told, highest)
