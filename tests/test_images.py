"""Decoding: real bytes of every kind, and a child process that really dies."""

from __future__ import annotations

import io
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import stylegan.images
from stylegan.images import DecodedImage, IsolatedDecoder, decode_image

SIZE = 32
QUADRANTS = ((200, 30, 30), (30, 160, 40), (40, 60, 190), (230, 200, 60))
"""Colours of the corners of the test picture: top left, top right, bottom left, bottom right."""


def picture(width: int = 96, height: int = 64) -> Image.Image:
    image = Image.new("RGB", (width, height))
    for index, colour in enumerate(QUADRANTS):
        box = (index % 2 * width // 2, index // 2 * height // 2)
        image.paste(colour, (*box, box[0] + width // 2, box[1] + height // 2))
    return image


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


ENCODED = {
    "jpeg": encode(picture(), "JPEG", quality=95, subsampling=0),
    "progressive jpeg": encode(picture(), "JPEG", quality=95, progressive=True, subsampling=0),
    "png": encode(picture(), "PNG"),
    "webp": encode(picture(), "WEBP", quality=95),
    "lossless webp": encode(picture(), "WEBP", lossless=True),
    "gif": encode(picture(), "GIF"),
    "animated gif": encode(
        picture(), "GIF", save_all=True, append_images=[Image.new("RGB", (96, 64))]
    ),
    "tiff": encode(picture(), "TIFF"),
    "lzw tiff": encode(picture(), "TIFF", compression="tiff_lzw"),
    "deflate tiff": encode(picture(), "TIFF", compression="tiff_adobe_deflate"),
    "cmyk tiff": encode(picture().convert("CMYK"), "TIFF"),
    "bmp": encode(picture(), "BMP"),
    "palette bmp": encode(picture().quantize(), "BMP"),
    "ppm": encode(picture(), "PPM"),
    "tga": encode(picture(), "TGA"),
    "rle tga": encode(picture(), "TGA", compression="tga_rle"),
    "pcx": encode(picture(), "PCX"),
    "jpeg 2000": encode(picture(), "JPEG2000"),
    "codestream": encode(picture(), "JPEG2000", no_jp2=True),
    "avif": encode(picture(), "AVIF", quality=90),
    "ico": encode(picture(64, 64), "ICO", sizes=[(64, 64)]),
    "cmyk jpeg": encode(picture().convert("CMYK"), "JPEG", quality=95),
    "palette png": encode(picture().quantize(), "PNG"),
    "rgba png": encode(picture().convert("RGBA"), "PNG"),
}


def corners(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """The colours in the middle of the four quadrants."""
    near, far = SIZE // 4, 3 * SIZE // 4
    return [tuple(map(int, pixels[y, x])) for y in (near, far) for x in (near, far)]


def check(image: DecodedImage, colours: tuple[tuple[int, ...], ...], tolerance: int = 12) -> None:
    assert image.error_class is None, image.error_message
    assert image.pixels is not None
    assert image.pixels.shape == (SIZE, SIZE, 3)
    assert image.pixels.dtype == np.uint8
    np.testing.assert_allclose(corners(image.pixels), colours, atol=tolerance)


@pytest.mark.parametrize("name", ENCODED)
def test_formats_of_the_whitelist(name: str) -> None:
    image = decode_image(ENCODED[name], SIZE)
    check(image, QUADRANTS)
    assert (image.width, image.height) == ((64, 64) if name == "ico" else (96, 64))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(format: str, orientation: int) -> None:
    # Row 0 and column 0 of the stored picture are, in words of EXIF, these sides of the upright.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture()
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(encode(stored, format, exif=exif, quality=95), SIZE)
    check(image, QUADRANTS, 40 if format in ("WEBP", "AVIF") else 12)
    assert (image.width, image.height) == (96, 64)


def test_grey_of_every_depth() -> None:
    grey = ((10,) * 3, (90,) * 3, (170,) * 3, (250,) * 3)
    eight = np.zeros((64, 64), np.uint8)
    for index, (value, _, _) in enumerate(grey):
        eight[index // 2 * 32 :][:32, index % 2 * 32 :][:, :32] = value
    sixteen = eight.astype(np.uint16) * 257
    for data in (
        encode(Image.fromarray(eight), "PNG"),
        encode(Image.fromarray(eight), "JPEG"),
        encode(Image.fromarray(sixteen), "PNG"),
        encode(Image.fromarray(sixteen), "TIFF"),
        encode(Image.fromarray(sixteen.astype(">u2")), "TIFF"),
        encode(Image.fromarray(sixteen.astype(np.int32)), "TIFF"),
        encode(Image.fromarray(sixteen), "PPM"),
        encode(Image.fromarray(eight / np.float32(255)), "TIFF"),
        encode(Image.fromarray(eight.astype(np.float32)), "TIFF"),
    ):
        check(decode_image(data, SIZE), grey, 3)
    # Beyond any usual range, the image's own range is what there is.
    wild = encode(Image.fromarray(eight.astype(np.float32) * 1e6 - 5e7), "TIFF")
    pixels = decode_image(wild, SIZE).pixels
    assert pixels is not None
    assert [corner[0] for corner in corners(pixels)] == pytest.approx([0, 85, 170, 255], abs=2)
    dark = encode(Image.fromarray(np.full((8, 8), 2570, np.uint16)), "PNG")
    check(decode_image(dark, SIZE), ((10, 10, 10),) * 4, 1)
    one_bit = encode(Image.fromarray(eight > 100), "PNG")
    check(decode_image(one_bit, SIZE), ((0,) * 3, (0,) * 3, (255,) * 3, (255,) * 3), 1)


def test_transparency_lies_on_white() -> None:
    clear = picture().convert("RGBA")
    clear.putalpha(0)
    clear.paste((30, 160, 40, 255), (48, 0, 96, 32))
    expected = ((255,) * 3, (30, 160, 40), (255,) * 3, (255,) * 3)
    for format in ("PNG", "WEBP", "TIFF", "TGA"):
        check(decode_image(encode(clear, format, lossless=True), SIZE), expected)
    palette = picture().quantize(4)
    green = palette.getpixel((90, 2))
    check(
        decode_image(encode(palette, "PNG", transparency=green), SIZE),
        (QUADRANTS[0], (255,) * 3, *QUADRANTS[2:]),
    )
    check(
        decode_image(encode(picture(), "PNG", transparency=QUADRANTS[0]), SIZE),
        ((255,) * 3, *QUADRANTS[1:]),
    )
    half = Image.new("LA", (8, 8), (0, 128))
    check(decode_image(encode(half, "PNG"), SIZE), ((127,) * 3,) * 4, 1)


def test_large_jpeg_is_decoded_at_reduced_scale() -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8))
    large = small.resize((3200, 2400), Image.Resampling.BICUBIC)
    image = decode_image(encode(large, "JPEG", quality=95, subsampling=0), SIZE)
    assert (image.width, image.height) == (3200, 2400)
    exact = np.asarray(large.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
    assert image.pixels is not None
    assert np.abs(image.pixels - exact).mean() < 2


def broken_png(width: int, height: int) -> bytes:
    """A PNG of this size in its header, with pixels that are no zlib stream."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, body in ((b"IHDR", header), (b"IDAT", b"?" * 99), (b"IEND", b"")):
        parts.append(struct.pack(">I", len(body)) + kind + body)
        parts.append(struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(parts)


@pytest.mark.parametrize(
    ("data", "error_class", "message"),
    [
        (b"", "truncated", "the file is empty"),
        (b"Shoes, red, size 42\n", "not an image", "this is text"),
        ("Größe 42\n".encode() * 200, "not an image", "this is text"),
        (b"<!DOCTYPE html><title>404</title>", "not an image", "this is an HTML page"),
        (b"PK\3\4" + bytes(60), "not an image", "this is a ZIP archive"),
        (b"\0\0\0\x20ftypisom" + bytes(60), "not an image", "this is an MP4 or QuickTime video"),
        (bytes(5000), "not an image", "every byte is zero"),
        (bytes(range(256)), "not an image", "the bytes begin like no known image format"),
        (b"RIFF\0\0\0\0WAVEfmt ", "not an image", "this is a WAVE sound"),
        (b"<?xml version='1.0'?><svg width='9'/>", "unsupported", "SVG images are not read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported", "EPS images are not read"),
        (b"%PDF-1.7\n", "unsupported", "PDF images are not read"),
        (b"\xd7\xcd\xc6\x9a" + bytes(60), "unsupported", "WMF images are not read"),
        (b"8BPS\0\1" + bytes(60), "unsupported", "Photoshop images are not read"),
        (b"\0\0\0\x18ftypheic" + bytes(60), "unsupported", "HEIC images are not read"),
        (
            broken_png(30_000, 30_000),
            "too large",
            "30,000 x 30,000 pixels are over the limit of 120,000,000",
        ),
        (ENCODED["jpeg"][:700], "truncated", "the JPEG file ends after 700 bytes"),
        (broken_png(9, 9), "unreadable", "the PNG data are damaged"),
        (
            ENCODED["bmp"][:30] + b"\x63" + ENCODED["bmp"][31:],
            "unsupported",
            "this variant of BMP is not read",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "bytes",
)
def test_what_cannot_be_read(data: bytes, error_class: str, message: str) -> None:
    image = decode_image(data, SIZE)
    assert image.pixels is None
    assert (image.error_class, image.error_message) == (error_class, message)
    if error_class == "too large":
        assert (image.width, image.height) == (30_000, 30_000)


def test_pixel_limit() -> None:
    assert decode_image(ENCODED["png"], SIZE, max_pixels=96 * 64).error_class is None
    assert decode_image(ENCODED["png"], SIZE, max_pixels=96 * 64 - 1).error_class == "too large"


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("part", [0.3, 0.5, 0.7])
def test_truncated_files_say_so(name: str, part: float) -> None:
    data = ENCODED[name][: int(len(ENCODED[name]) * part)]
    image = decode_image(data, SIZE)
    assert image.error_class == "truncated", image
    assert f"ends after {len(data):,} bytes" in (image.error_message or "")


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(ENCODED)),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=12)), min_size=1, max_size=6),
)
def test_mutated_files_are_a_picture_or_a_reason(
    name: str, changes: list[tuple[float, bytes]]
) -> None:
    data = bytearray(ENCODED[name])
    for place, new in changes:
        at = int(place**3 * len(data))  # mostly in the header
        data[at : at + len(new)] = new
    image = decode_image(bytes(data), SIZE, max_pixels=4_000_000)
    if image.pixels is None:
        assert image.error_class in (
            "not an image",
            "truncated",
            "too large",
            "unsupported",
            "unreadable",
        )
        assert re.fullmatch(r"[\w ,]+", image.error_message or "")  # no reprs, no addresses
    else:
        assert image.pixels.shape == (SIZE, SIZE, 3)
        assert image.error_class is None


# --- In a child process -------------------------------------------------------------------------

CHILD = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from stylegan.images import decode_image, serve

def decode(data, size):
    if data.startswith(b"ABORT"):
        os.abort()
    if data.startswith(b"HANG"):
        pow(3, 10**9)  # never lets another thread or a signal handler in
    if data.startswith(b"HOG"):
        bytearray(8 << 30)
    if data.startswith(b"SLOWLY"):
        time.sleep(0.05)
    os.write(1, b"chatter of a codec")
    os.write(2, b"chatter of a codec")
    return decode_image(data, size)

serve(decode)
"""

COMMAND = [sys.executable, "-c", CHILD, str(Path(stylegan.images.__file__).parents[1])]


def assert_same(left: DecodedImage, right: DecodedImage) -> None:
    assert (left.error_class, left.error_message) == (right.error_class, right.error_message)
    assert (left.width, left.height) == (right.width, right.height)
    np.testing.assert_array_equal(left.pixels, right.pixels)


def test_isolated_is_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    blobs = [*ENCODED.values(), b"", b"text", ENCODED["jpeg"][:700], broken_png(30_000, 30_000)]
    # Damaged in a way that makes libtiff and libjpeg write to stderr.
    blobs.append(ENCODED["deflate tiff"][:200] + b"????" + ENCODED["deflate tiff"][204:])
    blobs.append(os.urandom(3_000_000))
    with IsolatedDecoder() as decoder:
        for size in (SIZE, 200):  # 200: the replies are larger than a pipe
            answers = decoder.decode(blobs * 3, size)
            for blob, answer in zip(blobs * 3, answers, strict=True):
                if size == SIZE and blob is not blobs[-2]:
                    assert_same(answer, decode_image(blob, size))
        assert decoder.decode([], SIZE) == []
        nothing = DecodedImage(None, None, None, None, None)
        none, image = decoder.decode([None, ENCODED["png"]], SIZE)
        assert none == nothing
        check(image, QUADRANTS)
        assert image.pixels is not None
        image.pixels[0, 0] = 0  # writable: torch would warn otherwise
    assert capfd.readouterr().err == ""


def test_a_crash_costs_its_own_row_only(capfd: pytest.CaptureFixture[str]) -> None:
    good = list(ENCODED.values())
    blobs = [*good[:3], b"ABORT", None, *good[3:5], b"HOG", b"ABORT", good[5], b"", b"ABORT"]
    with IsolatedDecoder(COMMAND) as decoder:
        for _ in range(2):
            answers = decoder.decode(blobs, SIZE)
            assert len(answers) == len(blobs)
            for blob, answer in zip(blobs, answers, strict=True):
                if blob == b"ABORT":
                    assert answer == DecodedImage(
                        None, None, None, "crashed", "the decoder died of SIGABRT"
                    )
                elif blob == b"HOG":
                    assert answer.error_class == "crashed"
                    assert answer.error_message == "the decoder ended with exit code 1"
                elif blob:
                    check(answer, QUADRANTS)
    assert capfd.readouterr().err == ""


def test_a_hang_is_ended() -> None:
    with IsolatedDecoder(COMMAND, timeout_s=0.3) as decoder:
        first, hung, last = decoder.decode([ENCODED["png"], b"HANG", ENCODED["gif"]], SIZE)
    check(first, QUADRANTS)
    assert hung.error_class == "crashed"
    assert hung.error_message == "the decoder did not finish within 0.3 s"
    check(last, QUADRANTS)


def test_a_child_killed_from_outside_costs_nothing() -> None:
    with IsolatedDecoder(COMMAND) as decoder:
        decoder.decode([b"x"], SIZE)
        assert decoder._child is not None
        killer = subprocess.Popen(["/bin/sh", "-c", f"sleep 0.2; kill -9 {decoder._child.pid}"])
        answers = decoder.decode([b"SLOWLY", ENCODED["png"]] * 10, SIZE)
        assert killer.wait() == 0
    assert [answer.error_class for answer in answers] == ["not an image", None] * 10


def test_an_interrupted_batch_leaves_no_answers_behind() -> None:
    class Cancelled(BaseException):
        pass

    def cancel(*_: object) -> None:
        raise Cancelled

    before = signal.signal(signal.SIGALRM, cancel)
    try:
        with IsolatedDecoder(COMMAND) as decoder:
            decoder.decode([ENCODED["png"]], SIZE)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(Cancelled):
                decoder.decode([b"SLOWLY"] * 100, SIZE)
            check(decoder.decode([ENCODED["gif"]], SIZE)[0], QUADRANTS)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_child_that_does_not_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="does not start"):
        IsolatedDecoder([sys.executable, "-c", "raise SystemExit(3)"]).decode([b"x"], SIZE)


def test_the_child_ends_with_its_parent() -> None:
    parent = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from stylegan.images import IsolatedDecoder
decoder = IsolatedDecoder()
decoder.decode([b"x"], 8)
print(decoder._child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", parent, COMMAND[-1]]
    pid = int(subprocess.run(command, capture_output=True, check=False).stdout)
    state = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the decoder outlived its parent"
        time.sleep(0.05)
