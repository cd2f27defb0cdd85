"""Image bytes → RGB [size, size, 3] uint8, or the reason why not.

The format is decided by the bytes, never by a name, and must be on a whitelist of raster formats;
nothing that runs a program (EPS, PDF, WMF) is opened. `decode_image` works in this process;
`IsolatedDecoder` does the same in a child process, for files that crash or hang a codec.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Final

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    IcoImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PcxImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    QoiImagePlugin,
    TgaImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

MAX_PIXELS: Final = 120_000_000
"""Larger images are refused by their header: one decoded RGBA copy would take over 480 MB."""

TIMEOUT_S: Final = 30
"""Seconds of wall time that one image may take in the child process."""

MEMORY_LIMIT: Final = 4 << 30
"""Bytes of address space of the child process: several copies of the largest image allowed."""


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """One decoded image, or why it could not be decoded."""

    pixels: npt.NDArray[np.uint8] | None
    """[size, size, 3] RGB; None when failed."""
    width: int | None
    """Pixels of the upright original; None where it is unknown."""
    height: int | None
    error_class: str | None
    """None, "not an image", "truncated", "too large", "unsupported", "unreadable", "crashed"."""
    error_message: str | None


def decode_image(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Decode the first frame, upright and on white, squashed to [size, size, 3].

    The aspect ratio is not kept: the whole image is seen. Large JPEGs are decoded at a reduced
    scale of at least 2 * size. Colour profiles are ignored. Never raises for bad data.
    """
    found = identify(data)
    if isinstance(found, tuple):
        return _failed(*found)
    source = _Source(data)
    with warnings.catch_warnings():  # the codecs' chatter about odd metadata
        warnings.simplefilter("ignore")
        try:
            return _decode(_OPENERS[found](source), size, max_pixels)
        except Image.DecompressionBombError:
            return _failed("too large", f"more than the limit of {max_pixels:,} pixels")
        except MemoryError:
            return _failed("too large", f"decoding this {found} takes more memory than is allowed")
        except Exception as error:  # whatever a codec raises on bytes that somebody else wrote
            return _failed(*_diagnose(found, data, source, error))


def _decode(image: ImageFile.ImageFile, size: int, max_pixels: int) -> DecodedImage:
    width, height = image.size
    if width * height > max_pixels:
        message = f"{width:,} x {height:,} pixels are over the limit of {max_pixels:,}"
        return _failed("too large", message, width, height)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        image.draft(None, (2 * size, 2 * size))  # scales while decoding; 2: room for the resize
    image.load()
    orientation = _orientation(image)
    if orientation >= 5:
        width, height = height, width

    flat: Image.Image
    if image.mode.startswith("I") or image.mode == "F":
        flat = Image.fromarray(_eight_bits(np.asarray(image)))
    elif image.has_transparency_data:
        # Premultiplied, so that the colour of invisible pixels does not bleed into the visible.
        flat = image.convert("RGBA").convert("RGBa")
    elif image.mode in ("1", "L"):
        flat = image.convert("L")
    else:
        flat = image.convert("RGB")
    flat = flat.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0)
    if orientation in _UPRIGHT:  # after the resize: it is cheaper, and the target is a square
        flat = flat.transpose(_UPRIGHT[orientation])
    if flat.mode == "RGBa":
        rgba = np.asarray(flat).astype(np.int16)
        pixels = np.minimum(rgba[..., :3] + 255 - rgba[..., 3:], 255).astype(np.uint8)
    else:
        pixels = np.array(flat.convert("RGB"))
    return DecodedImage(pixels, width, height, None, None)


def _failed(
    error_class: str, message: str, width: int | None = None, height: int | None = None
) -> DecodedImage:
    return DecodedImage(None, width, height, error_class, message)


_UPRIGHT: Final = {  # EXIF 2.32, tag 0x0112
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: ImageFile.ImageFile) -> int:
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # broken metadata do not make the picture unreadable
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _eight_bits(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Grey of 16 or 32 bits → 8 bits: by the type's range if the values keep to it, else by theirs.

    Integers range to 65535 (a dark 16-bit image stays dark), floats to 1, 255 or 65535.
    """
    if values.dtype.kind == "u":
        return np.asarray(values // 256, np.uint8)
    finite = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(finite.min()), float(finite.max())
    full = next((top for top in _RANGES[values.dtype.kind] if low >= 0 and high <= top), None)
    if full is None:
        finite -= low
        full = high - low
    return np.asarray(finite * (255.0 / (full or 1.0)), np.uint8)


_RANGES: Final = {"i": (65535.0,), "f": (1.0, 255.0, 65535.0)}

# --- What the bytes are -------------------------------------------------------------------------

_OPENERS: Final[dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "JPEG 2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "ICO": IcoImagePlugin.IcoImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "QOI": QoiImagePlugin.QoiImageFile,
    "PCX": PcxImagePlugin.PcxImageFile,
    "TGA": TgaImagePlugin.TgaImageFile,
}

EXTENSIONS: Final = {
    "JPEG": "jpg", "PNG": "png", "WebP": "webp", "GIF": "gif", "TIFF": "tif", "BMP": "bmp",
    "AVIF": "avif", "JPEG 2000": "jp2", "ICO": "ico", "PPM": "ppm", "QOI": "qoi", "PCX": "pcx",
    "TGA": "tga",
}  # fmt: skip
"""Of file names, by format."""

_READ, _UNSUPPORTED, _NO_IMAGE = "", "unsupported", "not an image"

_SIGNATURES: Final = (  # offset, bytes, error class, name
    (0, b"\xff\xd8", _READ, "JPEG"),
    (0, b"\x89PNG", _READ, "PNG"),
    (8, b"WEBP", _READ, "WebP"),
    (0, b"GIF8", _READ, "GIF"),
    (0, b"II*\0", _READ, "TIFF"),
    (0, b"MM\0*", _READ, "TIFF"),
    (0, b"II+\0", _READ, "TIFF"),
    (0, b"MM\0+", _READ, "TIFF"),
    (0, b"\0\0\0\x0cjP  ", _READ, "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", _READ, "JPEG 2000"),
    (0, b"\0\0\1\0", _READ, "ICO"),
    (0, b"qoif", _READ, "QOI"),
    (0, b"%PDF", _UNSUPPORTED, "PDF"),
    (0, b"%!PS", _UNSUPPORTED, "EPS"),
    (0, b"\xc5\xd0\xd3\xc6", _UNSUPPORTED, "EPS"),
    (0, b"\xd7\xcd\xc6\x9a", _UNSUPPORTED, "WMF"),
    (0, b"\1\0\x09\0\0\3", _UNSUPPORTED, "WMF"),
    (40, b" EMF", _UNSUPPORTED, "EMF"),
    (0, b"8BPS", _UNSUPPORTED, "Photoshop"),
    (0, b"gimp xcf", _UNSUPPORTED, "GIMP"),
    (0, b"\xff\x0a", _UNSUPPORTED, "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", _UNSUPPORTED, "JPEG XL"),
    (0, b"II\xbc\1", _UNSUPPORTED, "JPEG XR"),
    (0, b"AT&TFORM", _UNSUPPORTED, "DjVu"),
    (0, b"\x76\x2f\x31\x01", _UNSUPPORTED, "OpenEXR"),
    (0, b"#?RADIANCE", _UNSUPPORTED, "Radiance HDR"),
    (0, b"SIMPLE  =", _UNSUPPORTED, "FITS"),
    (128, b"DICM", _UNSUPPORTED, "DICOM"),
    (0, b"DDS ", _UNSUPPORTED, "DDS"),
    (0, b"icns", _UNSUPPORTED, "ICNS"),
    (0, b"\1\xda", _UNSUPPORTED, "SGI"),
    (0, b"/* XPM", _UNSUPPORTED, "XPM"),
    (0, b"#define ", _UNSUPPORTED, "XBM"),
    (0, b"IIRO", _UNSUPPORTED, "camera raw"),
    (0, b"IIU\0", _UNSUPPORTED, "camera raw"),
    (0, b"FUJIFILMCCD-RAW", _UNSUPPORTED, "camera raw"),
    (0, b"PK\3\4", _NO_IMAGE, "a ZIP archive"),
    (0, b"PK\5\6", _NO_IMAGE, "a ZIP archive"),
    (0, b"\x1f\x8b", _NO_IMAGE, "gzip data"),
    (0, b"BZh", _NO_IMAGE, "bzip2 data"),
    (0, b"\xfd7zXZ\0", _NO_IMAGE, "xz data"),
    (0, b"\x28\xb5\x2f\xfd", _NO_IMAGE, "zstd data"),
    (0, b"7z\xbc\xaf\x27\x1c", _NO_IMAGE, "a 7z archive"),
    (0, b"Rar!", _NO_IMAGE, "a RAR archive"),
    (257, b"ustar", _NO_IMAGE, "a tar archive"),
    (0, b"PAR1", _NO_IMAGE, "a Parquet file"),
    (0, b"SQLite format 3", _NO_IMAGE, "a database"),
    (0, b"\x7fELF", _NO_IMAGE, "a program"),
    (0, b"MZ", _NO_IMAGE, "a program"),
    (8, b"AVI ", _NO_IMAGE, "an AVI video"),
    (8, b"WAVE", _NO_IMAGE, "a WAVE sound"),
    (0, b"\x1aE\xdf\xa3", _NO_IMAGE, "a Matroska video"),
    (0, b"\0\0\1\xba", _NO_IMAGE, "an MPEG video"),
    (0, b"\0\0\1\xb3", _NO_IMAGE, "an MPEG video"),
    (0, b"FLV\1", _NO_IMAGE, "a Flash video"),
    (0, b"\x30\x26\xb2\x75", _NO_IMAGE, "a Windows Media file"),
    (0, b"OggS", _NO_IMAGE, "an Ogg file"),
    (0, b"ID3", _NO_IMAGE, "an MP3 file"),
    (0, b"fLaC", _NO_IMAGE, "a FLAC file"),
)


def identify(data: bytes) -> str | tuple[str, str]:
    """A key of _OPENERS, or the error class and message of what cannot be read."""
    if not data:
        return "truncated", "the file is empty"
    for offset, magic, error_class, name in _SIGNATURES:
        if data.startswith(magic, offset):
            if error_class == _UNSUPPORTED:
                return error_class, f"{name} images are not read"
            return (error_class, f"this is {name}") if error_class else name
    if data[4:8] == b"ftyp":  # ISO 14496-12: a brand, a version, compatible brands
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        if brands[:4] in (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1"):
            return _UNSUPPORTED, "HEIC images are not read"
        return _NO_IMAGE, "this is an MP4 or QuickTime video"
    # Weak signatures come last and look at more of the header.
    if data.startswith(b"BM") and data[15:18] == b"\0\0\0" and 12 <= data[14] <= 124:
        return "BMP"
    if re.match(rb"P[1-6][ \t\r\n#]", data):
        return "PPM"
    if re.match(rb"\n[\x00\x02\x03\x05]\x01[\x01\x02\x04\x08]", data):
        return "PCX"
    if re.search(rb"<svg[\s>]", data[:1024]):
        return _UNSUPPORTED, "SVG images are not read"
    # Targa has no signature at all: every field of its header must make sense.
    header = struct.unpack("<xBB9x2HB", data[:17].ljust(17, b"\0"))
    colour_map, kind, width, height, depth = header
    if width and height and depth in (8, 15, 16, 24, 32) and (colour_map, kind) in _TGA_KINDS:
        return "TGA"
    return _NO_IMAGE, _describe_other(data)


_TGA_KINDS: Final = ((1, 1), (1, 9), (0, 2), (0, 3), (0, 10), (0, 11))


def _describe_other(data: bytes) -> str:
    if not data.strip(b"\0"):
        return "every byte is zero"
    head = data[:1024]
    text = head.decode(errors="replace").rstrip("\ufffd")  # the cut may split a character
    if not text or "\ufffd" in text or re.search(r"[\0-\x08\x0e-\x1a]", text):
        return "the bytes begin like no known image format"
    if re.search(r"<!doctype html|<html", text, re.IGNORECASE):
        return "this is an HTML page"
    return "this is text"


# --- Why a codec gave up ------------------------------------------------------------------------


class _Source(io.BytesIO):
    """Bytes that remember whether a codec asked for more than there were."""

    ran_dry = False

    def read(self, size: int | None = -1, /) -> bytes:
        chunk = super().read(size)
        # Pixels are read in blocks of 64 KiB, of which the last is short in every sound file.
        if size is not None and len(chunk) < size and (not chunk or size < 1 << 16):
            self.ran_dry = True
        return chunk


def _diagnose(found: str, data: bytes, source: _Source, error: Exception) -> tuple[str, str]:
    text = str(error).lower()
    if source.ran_dry or "truncated" in text or len(data) < _declared_length(found, data):
        return "truncated", f"the {found} file ends after {len(data):,} bytes"
    if isinstance(error, NotImplementedError) or _NOT_BUILT.search(text):
        return "unsupported", f"this variant of {found} is not read"
    return "unreadable", f"the {found} data are damaged"


_NOT_BUILT: Final = re.compile(
    "unsupported|not supported|not available|not installed|unknown pixel mode|conversion from"
)


def _declared_length(found: str, data: bytes) -> int:
    """Bytes that the container says it has, for the codecs that take the file in one piece."""
    if found == "WebP":
        return int.from_bytes(data[4:8], "little") + 8
    end = 0
    if found == "JPEG 2000" and data[:1] == b"\xff":  # a bare codestream ends in a marker
        return len(data) + (not data.endswith(b"\xff\xd9"))
    if found in ("AVIF", "JPEG 2000"):  # boxes, ISO 14496-12
        while end + 8 <= len(data) and (box := int.from_bytes(data[end : end + 4], "big")) >= 8:
            end += box
    if found == "TIFF":
        with contextlib.suppress(Exception):  # the directory may be the broken part
            tags = TiffImagePlugin.TiffImageFile(io.BytesIO(data)).tag_v2
            for offsets, counts in ((273, 279), (324, 325)):  # strips, tiles
                if offsets in tags and counts in tags:
                    end = max(map(sum, zip(tags[offsets], tags[counts], strict=False)))
    return end


# --- The child process --------------------------------------------------------------------------

_READY: Final = b"stylegan"
_REQUEST: Final = struct.Struct("<QId")  # bytes of the image, size, seconds allowed
_REPLY: Final = struct.Struct("<qqQI")  # width, height (-1: unknown), bytes of pixels, of the error


class IsolatedDecoder:
    """Decodes in one persistent child process, so that a crash costs the offending image only.

    When the child dies, the image it died on is tried once more alone in a fresh child; if that
    dies too, the image comes back with error_class "crashed". The others are not affected. The
    child ends when this process does. Starts on the first use; close it, or use it in `with`.
    """

    def __init__(self, command: Sequence[str] = (), timeout_s: float = TIMEOUT_S) -> None:
        """`command` replaces the child by another program that calls `serve`."""
        # By path and with -P: nothing else of the package is imported, wherever it lies.
        self._command = list(command) or [sys.executable, "-P", __file__]
        self._child: subprocess.Popen[bytes] | None = None
        self._timeout_s = timeout_s
        self._ending = ""
        self._lock = threading.Lock()

    def decode(self, blobs: Sequence[bytes | None], size: int) -> list[DecodedImage]:
        """`decode_image` for each blob, in order; for None, an empty result without an error.

        Raises RuntimeError when the child process cannot be started.
        """
        results = [DecodedImage(None, None, None, None, None)] * len(blobs)
        pending = [index for index, blob in enumerate(blobs) if blob is not None]
        with self._lock:
            alone = False
            while pending:
                asked = pending[:1] if alone else pending
                answers = self._ask([blobs[index] or b"" for index in asked], size)
                if alone and not answers:
                    answers = [_failed("crashed", self._ending)]
                for index, answer in zip(asked, answers, strict=False):
                    results[index] = answer
                pending = pending[len(answers) :]
                alone = len(answers) < len(asked)
        return results

    def close(self) -> None:
        """End the child process; a later `decode` starts another."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):  # what was not sent any more
                    pipe.close()  # type: ignore[union-attr]

    def __enter__(self) -> IsolatedDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _ask(self, blobs: list[bytes], size: int) -> list[DecodedImage]:
        """The answers up to the child's death; fewer than there are blobs when it died."""
        child = self._child = self._child or self._start()
        assert child.stdin is not None and child.stdout is not None
        requests = [(_REQUEST.pack(len(blob), size, self._timeout_s), blob) for blob in blobs]
        # A thread, because either side blocks when both pipes are full.
        sender = threading.Thread(target=_send, args=(child.stdin, requests), daemon=True)
        answers: list[DecodedImage] = []
        try:
            sender.start()
            while len(answers) < len(blobs) and (answer := _receive(child.stdout, size)):
                answers.append(answer)
            if len(answers) < len(blobs):
                self._ending = self._describe_exit(child.wait())
                self.close()
            sender.join()
        except BaseException:  # also a cancelled task: unread answers would be taken for the next
            self.close()
            raise
        return answers

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert child.stdout is not None
        if child.stdout.read(len(_READY)) != _READY:
            child.communicate()
            raise RuntimeError(
                f"the decoder process {self._command} does not start"
                f" ({self._describe_exit(child.wait())}); its own message is above"
            )
        return child

    def _describe_exit(self, code: int) -> str:
        if code == -signal.SIGALRM:
            return f"the decoder did not finish within {self._timeout_s:g} s"
        if code < 0:
            return f"the decoder died of {signal.Signals(-code).name}"
        return f"the decoder ended with exit code {code}"


def _send(pipe: IO[bytes], requests: list[tuple[bytes, bytes]]) -> None:
    with contextlib.suppress(OSError, ValueError):  # the child died; the reader sees it too
        for request in requests:
            pipe.writelines(request)
        pipe.flush()


def _receive(pipe: IO[bytes], size: int) -> DecodedImage | None:
    header = pipe.read(_REPLY.size)
    if len(header) < _REPLY.size:
        return None
    width, height, num_pixel_bytes, num_error_bytes = _REPLY.unpack(header)
    pixels = bytearray(num_pixel_bytes)
    if pipe.readinto(pixels) < num_pixel_bytes:  # type: ignore[attr-defined]
        return None
    error = pipe.read(num_error_bytes)
    if len(error) < num_error_bytes:
        return None
    error_class, _, message = error.decode().partition("\n")
    return DecodedImage(
        np.frombuffer(pixels, np.uint8).reshape(size, size, 3) if pixels else None,
        width if width >= 0 else None,
        height if height >= 0 else None,
        error_class or None,
        message or None,
    )


def serve(decode: Callable[[bytes, int], DecodedImage] = decode_image) -> None:
    """The child's loop: requests on stdin, replies on stdout, until the parent closes stdin.

    An image that takes longer than is allowed ends the process by SIGALRM, even inside a codec.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # codecs print to stderr, and nothing may print into the replies
        os.dup2(null, descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C ends
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # a lower limit may be in force already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # one CPU a decoder, as the job counts them
    with contextlib.suppress(BrokenPipeError):
        replies.write(_READY)
        replies.flush()
        while len(header := requests.read(_REQUEST.size)) == _REQUEST.size:
            num_bytes, size, timeout_s = _REQUEST.unpack(header)
            blob = requests.read(num_bytes)
            if len(blob) < num_bytes:
                break
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            image = decode(blob, size)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pixels = b"" if image.pixels is None else image.pixels.tobytes()
            error = f"{image.error_class or ''}\n{image.error_message or ''}".encode()
            width, height = (-1 if n is None else n for n in (image.width, image.height))
            replies.write(_REPLY.pack(width, height, len(pixels), len(error)))
            replies.write(pixels)
            replies.write(error)
            replies.flush()


if __name__ == "__main__":
    serve()
