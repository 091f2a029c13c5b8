"""Decoding: one right answer per encoding, one kind of error for every bad file."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from testing.places import SHARED_DATA
from weaksam.data.images import decode_image, image_size, read_sizes
from weaksam.errors import ImageError


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def scene(height: int = 37, width: int = 53) -> Image.Image:
    """A smooth picture with a noisy patch: every coder has something to do."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 3, y * 4, (x + y) * 2], -1).astype(np.uint8)
    patch = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    h, w = min(20, height), min(20, width)
    pixels[:h, :w] = patch[:h, :w]
    return Image.fromarray(pixels)


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, image.size[::-1], dtype=np.uint8)))
    return image


def grey16() -> Image.Image:
    return Image.fromarray(np.random.default_rng(2).integers(0, 65536, (9, 11), dtype=np.uint16))


def encodings() -> dict[str, bytes]:
    rgb = scene()
    return {
        "jpeg": encode(rgb, "JPEG"),
        "jpeg progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg grey": encode(rgb.convert("L"), "JPEG"),
        "jpeg cmyk": encode(rgb.convert("CMYK"), "JPEG"),
        "png": encode(rgb, "PNG"),
        "png rgba": encode(with_alpha(rgb), "PNG"),
        "png palette": encode(rgb.quantize(20), "PNG", transparency=3),
        "png 1 bit": encode(rgb.convert("1"), "PNG"),
        "png 16 bit": encode(grey16(), "PNG"),
        "webp": encode(rgb, "WEBP"),
        "webp lossless alpha": encode(with_alpha(rgb), "WEBP", lossless=True),
        "bmp": encode(rgb, "BMP"),
        "gif": encode(rgb, "GIF"),
        "tiff": encode(rgb, "TIFF"),
        "tiff lzw": encode(rgb, "TIFF", compression="tiff_lzw"),
        "tiff deflate": encode(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": encode(rgb, "TIFF", compression="jpeg"),
    }


ENCODINGS = encodings()


def png(height: int, width: int, depth: int, color: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG made by hand, for the kinds Pillow cannot write; `rows` is raw data, filter byte 0 per line included."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = b"".join(chunk(*one) for one in chunks)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_gives_contiguous_writable_rgb(name: str) -> None:
    pixels = decode_image(ENCODINGS[name])
    assert pixels.dtype == np.uint8
    assert pixels.shape == (*image_size(ENCODINGS[name]), 3)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


@pytest.mark.parametrize("name", ["png", "bmp", "tiff", "tiff lzw", "tiff deflate"])
def test_lossless_encodings_give_the_pixels_back(name: str) -> None:
    np.testing.assert_array_equal(decode_image(ENCODINGS[name]), np.asarray(scene()))


@pytest.mark.parametrize(
    "options", [{"subsampling": s} for s in (0, 1, 2)] + [{"progressive": True}, {"keep_rgb": True}]
)
def test_jpeg_is_what_pillow_gives(options: dict) -> None:
    data = encode(scene(17, 31), "JPEG", quality=88, **options)
    np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_photographs_are_what_pillow_gives() -> None:
    folder = SHARED_DATA / "voc2012_100" / "JPEGImages"
    if not folder.is_dir():
        pytest.skip(f"no photographs at {folder}")
    for path in sorted(folder.iterdir())[:40]:
        pixels = decode_image(path.read_bytes())
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(path).convert("RGB")), err_msg=path.name)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(scene(), form, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(decode_image(data), np.asarray(expected))
    assert image_size(data) == expected.size[::-1] == ((53, 37) if orientation >= 5 else (37, 53))


@pytest.mark.parametrize("exif", [b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
@pytest.mark.filterwarnings("ignore:.*Corrupt EXIF")
def test_a_damaged_exif_block_does_not_cost_the_image(exif: bytes) -> None:
    assert decode_image(encode(scene(), "JPEG", exif=exif)).shape == (37, 53, 3)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_impossible_orientation_is_none(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert image_size(encode(scene(), "JPEG", exif=exif)) == (37, 53)


def test_transparent_pixels_are_white_and_half_transparent_ones_mixed() -> None:
    layer = with_alpha(scene())
    rgba = np.asarray(layer).astype(np.float64)
    color, alpha = rgba[..., :3], rgba[..., 3:]
    expected = np.floor((color * alpha + 255 * (255 - alpha)) / 255 + 0.5)
    for data in (encode(layer, "PNG"), encode(layer, "TIFF")):
        np.testing.assert_array_equal(decode_image(data), expected)


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    layer = scene().convert("RGBA")
    np.testing.assert_array_equal(decode_image(encode(layer, "PNG")), np.asarray(scene()))


def test_grey_with_alpha_and_transparent_colours() -> None:
    grey_alpha = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    assert decode_image(encode(grey_alpha, "PNG")).tolist() == [[[10] * 3, [255] * 3]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 8, 7, 1, 2, 3])
    assert decode_image(encode(palette, "PNG")).tolist() == [[[9, 8, 7], [1, 2, 3]]]
    assert decode_image(encode(palette, "PNG", transparency=0)).tolist() == [[[255] * 3, [1, 2, 3]]]
    assert decode_image(encode(palette, "GIF", transparency=0)).tolist() == [[[255] * 3, [1, 2, 3]]]
    keyed = encode(Image.fromarray(np.array([[5, 6]], np.uint8)), "PNG", transparency=6)
    assert decode_image(keyed).tolist() == [[[5] * 3, [255] * 3]]


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "expected"),
    [
        (16, 0, struct.pack(">2H", 1000, 40000), (1000,), [255, 156]),
        (16, 0, struct.pack(">2H", 1000, 1001), (1000,), [255, 4]),  # all 16 bits are compared
        (16, 2, struct.pack(">6H", *[1000] * 3, *[40000] * 3), (1000,) * 3, [255, 156]),
        (8, 0, bytes([10, 200]), (10,), [255, 200]),
        (4, 0, bytes([0x2A]), (2,), [255, 170]),
        (2, 0, bytes([0b01100000]), (1,), [255, 170]),
        (1, 0, bytes([0b01000000]), (0,), [255, 255]),
    ],
)
def test_the_transparent_value_of_a_png_is_white_in_every_bit_depth(
    depth: int, colour: int, row: bytes, key: tuple[int, ...], expected: list[int]
) -> None:
    data = png(1, 2, depth, colour, b"\0" + row, (b"tRNS", struct.pack(f">{len(key)}H", *key)))
    assert decode_image(data)[0, :, 0].tolist() == expected


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 127, 129, 256, 257, 32768, 65406, 65535]], np.uint16)
    grey = decode_image(encode(Image.fromarray(values), "PNG"))[0, :, 0]
    assert grey.tolist() == [0, 0, 1, 1, 1, 128, 254, 255] == np.rint(values[0] / 257).astype(int).tolist()
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(values), "TIFF"))[0, :, 0], grey)


def test_16_bit_colour_keeps_its_high_byte() -> None:
    row = b"\0" + struct.pack(">6H", 0xFF00, 0x12FF, 0, 0x8000, 1, 65535)
    assert decode_image(png(1, 2, 16, 2, row)).tolist() == [[[255, 0x12, 0], [128, 0, 255]]]
    row = b"\0" + struct.pack(">4H", 0xFF00, 0xFFFF, 0x1200, 0)  # grey and alpha
    assert decode_image(png(1, 2, 16, 4, row)).tolist() == [[[255] * 3, [255] * 3]]


def test_1_bit_is_black_and_white() -> None:
    bits = Image.fromarray(np.array([[0, 255, 0]], np.uint8)).convert("1")
    assert decode_image(encode(bits, "PNG"))[0, :, 0].tolist() == [0, 255, 0]


def test_cmyk_is_read_as_stored_inverted_with_and_without_the_adobe_marker() -> None:
    cyan = encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
    start = cyan.index(b"\xff\xee")
    unmarked = cyan[:start] + cyan[start + 2 + struct.unpack(">H", cyan[start + 2 : start + 4])[0] :]
    for data in (cyan, unmarked):
        assert np.abs(decode_image(data).astype(int) - [0, 255, 255]).max() <= 3


def test_32_bit_pixels_are_refused_with_the_reason() -> None:
    with pytest.raises(ImageError, match="no fixed range"):
        decode_image(encode(Image.new("F", (3, 3), 0.5), "TIFF"))


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert decode_image(data)[0, 0].tolist() == [255, 0, 0], form


@pytest.mark.parametrize("size", [(1, 1), (50, 20_000), (20_000, 50), (1, 16_000)])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_extreme_shapes(size: tuple[int, int], form: str) -> None:
    assert decode_image(encode(Image.new("RGB", size[::-1], (10, 20, 30)), form)).shape == (*size, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "starts with b'<!DOCTYPE html>"),
        (b"BMW is a car maker", "damaged"),
        (b"\xff\xd8\xff", "damaged"),
        (b"RIFF\0\0\0\0WAVEfmt ", "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG"),
    ],
)
def test_what_is_no_image_is_unreadable(data: bytes, message: str) -> None:
    for function in (decode_image, image_size):
        with pytest.raises(ImageError, match=message) as caught:
            function(data)
        assert caught.value.status == "unreadable"


def pixels_or_status(data: bytes) -> np.ndarray | str:
    try:
        return decode_image(data, max_pixels=1_000_000)
    except ImageError as error:
        return error.status


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.filterwarnings("ignore:.*(Corrupt EXIF|Truncated File)")
def test_a_cut_off_file_is_unreadable_and_never_half_grey(name: str) -> None:
    data = ENCODINGS[name]
    whole = decode_image(data)
    for cut in np.linspace(0, len(data) - 1, 40).astype(int):
        got = pixels_or_status(data[:cut])
        if isinstance(got, str):
            assert got == "unreadable"
        else:  # only the end marker is missing
            assert len(data) - cut <= 24
            np.testing.assert_array_equal(got, whole)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_raise_image_errors_only(name: str) -> None:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for _ in range(60):
        data = bytearray(ENCODINGS[name])
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(len(data))] = rng.integers(256)
        got = pixels_or_status(bytes(data))
        if isinstance(got, str):
            assert got in ("unreadable", "too_large")
        else:
            assert got.shape == (*image_size(bytes(data)), 3)


def test_too_large_is_told_from_the_header() -> None:
    bomb = png(60_000, 60_000, 8, 2, b"")
    with pytest.raises(ImageError, match="60000 x 60000 pixels, the limit is 100000000") as caught:
        decode_image(bomb)
    assert caught.value.status == "too_large"
    assert image_size(bomb) == (60_000, 60_000)
    assert decode_image(ENCODINGS["jpeg"], max_pixels=37 * 53).shape == (37, 53, 3)
    with pytest.raises(ImageError, match="too_large"):
        decode_image(ENCODINGS["jpeg"], max_pixels=37 * 53 - 1)


def test_a_webp_bomb_is_too_large_or_unreadable() -> None:
    canvas = struct.pack("<BxxxI", 0, 16382)[:7] + struct.pack("<I", 16382)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas
    with pytest.raises(ImageError):
        decode_image(b"RIFF" + struct.pack("<I", len(body)) + body)


def test_pillows_limit_and_its_warning_play_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(ENCODINGS["jpeg"]).shape == (37, 53, 3)
        assert decode_image(ENCODINGS["png"]).shape == (37, 53, 3)


def test_threads_get_the_same_pixels() -> None:
    alone = {name: decode_image(data) for name, data in ENCODINGS.items()}
    with ThreadPoolExecutor(8) as pool:
        for name, pixels in pool.map(lambda name: (name, decode_image(ENCODINGS[name])), list(ENCODINGS) * 8):
            np.testing.assert_array_equal(pixels, alone[name])


def test_sizes_are_read_from_headers(tmp_path: Path) -> None:
    assert read_sizes([]) == []
    exif = Image.Exif()
    exif[0x0112] = 6
    big = scene(300, 200)
    files: dict[str, Callable[[], bytes]] = {
        "turned.jpg": lambda: encode(scene(), "JPEG", exif=exif),
        # 130 kB of comments before the frame header: the first 64 KiB are not enough.
        "long_header.jpg": lambda: encode(scene(), "JPEG", comment=b"x" * 65_000, icc_profile=b"y" * 65_000),
        "big.tif": lambda: encode(big, "TIFF"),  # the directory may follow the pixels
        "big.webp": lambda: encode(Image.effect_noise((400, 400), 90).convert("RGB"), "WEBP", lossless=True),
        "broken.jpg": lambda: b"nothing",
        "half.png": lambda: encode(big, "PNG")[:200],
    }
    for name, make in files.items():
        (tmp_path / name).write_bytes(make())
    sizes = read_sizes([str(tmp_path / name) for name in [*files, "absent.jpg"]])
    assert sizes == [(53, 37), (37, 53), (300, 200), (400, 400), None, (300, 200), None]
