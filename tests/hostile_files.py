"""Files as an attacker makes them: a few bytes that claim to be huge."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def picture(size=(32, 24), seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image=None, kind="PNG", **options) -> bytes:
    data = io.BytesIO()
    (image or picture()).save(data, kind, **options)
    return data.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be of any size."""

    def chunk(kind, content):
        return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))

    header = struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def with_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    chunk = struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))
    return png[:33] + chunk + png[33:]


def packed_tiff(values: np.ndarray) -> bytes:
    """A TIFF of 12-bit gray, two pixels in three bytes."""
    first, second = values.reshape(-1, 2).T
    data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<L", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def lost_color() -> bytes:
    """A PNG whose transparent color is none of its palette."""
    image = Image.new("P", (16, 16), 3)
    image.putpalette(bytes(12))
    data = encoded(image)
    kind = b"PLTE" + data[data.index(b"PLTE") + 4 :][: int.from_bytes(data[data.index(b"PLTE") - 4 :][:4], "big")]
    end = data.index(b"PLTE") + len(kind) + 4
    content = b"tRNS" + b"\xff" * 300 + b"\0"
    return data[:end] + struct.pack(">L", 301) + content + struct.pack(">L", zlib.crc32(content)) + data[end:]


def mutated(data: bytes, chance: np.random.Generator) -> bytes:
    """A file with changed, lost and added bytes, most of them in its header; a PNG has the right checksums."""
    found = bytearray(data)
    for _ in range(chance.integers(1, 4)):
        place = int(chance.integers(min(len(found), int(chance.choice([40, 200, 10**6])))))
        match chance.integers(6):
            case 0:
                del found[place + 1 :]
            case 1:
                found[place] ^= 1 << chance.integers(8)
            case 2:
                found[place] = chance.choice([0, 1, 127, 255])
            case 3:
                del found[place : place + chance.integers(1, 20)]
            case 4:
                found[place:place] = chance.bytes(chance.integers(1, 20))
            case 5:
                found[place : place + 4] = chance.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\0\0\0\x10"])
        found = found or bytearray(b"x")
    return _checked(bytes(found)) if data.startswith(b"\x89PNG") else bytes(found)


def _checked(png: bytes) -> bytes:
    whole, place = png[:8], 8
    while place + 12 <= len(png) and (end := place + 8 + int.from_bytes(png[place : place + 4], "big")) + 4 <= len(
        png
    ):
        whole += png[place:end] + struct.pack(">L", zlib.crc32(png[place + 4 : end]))
        place = end + 4
    return whole + png[place:]


def ordinary_files() -> list[bytes]:
    """Files of every format, mode and kind of compression that cameras and editors write."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture().resize((8, 6)).resize((32, 24))
    indexed, deep = image.quantize(16), Image.fromarray(np.arange(768, dtype=np.uint16).reshape(24, 32) * 5)
    files = [encoded(kind, "PNG") for kind in (image, image.convert("LA"), image.convert("1"), indexed, deep)]
    files += [encoded(indexed, "PNG", transparency=alpha) for alpha in (3, bytes(range(16)))]
    files += [encoded(kind, "JPEG", exif=exif, icc_profile=b"none") for kind in (image, image.convert("CMYK"))]
    packed = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", None)
    files += [encoded(image, "TIFF", compression=kind, exif=exif) for kind in packed]
    files += [encoded(kind, "TIFF") for kind in (deep, indexed, image.convert("F"), image.convert("1"))]
    files += [encoded(indexed, "GIF", transparency=2), encoded(image, "BMP"), encoded(indexed, "BMP")]
    return files + [encoded(image, "WEBP", exif=exif), encoded(image.convert("RGBA"), "WEBP", lossless=True)]


def gif_header(screen: tuple, frame: tuple) -> bytes:
    """A GIF whose frame may exceed its screen."""
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", *screen, 0x80, 0, 0)
        + bytes(6)
        + b","
        + struct.pack("<HHHHB", 0, 0, *frame, 0)
    ) + b"\x02\x02\x4c\x01\x00;"


def tiff_tags(width: int, height: int, data: bytes | None = None, **tile) -> bytes:
    """A deflated gray TIFF of one tile that claims any sizes."""
    data = zlib.compress(bytes(1000)) if data is None else data
    data += bytes(len(data) % 2)
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile.get("w", 16), 323: tile.get("h", 16)}
    tags |= {324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<L", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def webp_header(width: int, height: int) -> bytes:
    """An extended WebP of no picture with a canvas of any size."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<L", 10) + bytes(4) + size
    return b"RIFF" + struct.pack("<L", len(body)) + body
