"""Frames become an mp4 that knows how it was made.

    frames -> AHEAD of them at most wait -> 8 bits and a pipe, by a thread -> ffmpeg

Invariants: whoever makes the frames waits for the encoder only where AHEAD of them are waiting; the file appears under
its name whole or not at all (hidden temporary file in the same folder, fsync, rename), and an existing one is replaced
only then; frame count and size are exact. H.264, yuv420p, colours converted and tagged as BT.709. The
settings are the mp4's `comment` and lie beside it as OUTPUT.mp4.json. Left out: sound, other containers and
codecs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lowvram_i2v.errors import PlatformError, RequestError, ResourceError
from lowvram_i2v.whole_file import hidden, land

Frame = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
"""[H, W, 3], RGB: 0..255, or numbers in 0..1."""

AHEAD = 48  # frames that wait for the encoder: those of a tile of time, so that the next one is decoded meanwhile
CRF = 16  # x264's quality: 18 is commonly called visually lossless, lower is better
BYTES_A_PIXEL = 0.2  # of the mp4, a generous estimate: smooth video needs a tenth of it
DISK_MARGIN = 32 << 20
REINSTALL = "Reinstall imageio-ffmpeg, or name another ffmpeg in IMAGEIO_FFMPEG_EXE."
SIGNALS = {
    25: "Files may not become that large: raise the limit (ulimit -f).",
    9: "The system does that where RAM runs out: close other programs. Latents that were saved need only be decoded.",
}
"""What a user can do where ffmpeg is ended by one of these, by Linux's numbers."""
BT709 = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]


def to_uint8(frames: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    """Values in 0..1, any shape, to 0..255: clipped and rounded. Raises PlatformError for NaN."""
    if np.isnan(frames).any():
        raise PlatformError(
            "the decoded frames hold values that are not numbers",
            "`lowvram-i2v verify` looks for damaged weights; lowvram-i2v decode --device cpu decodes saved latents in "
            "float32, in which nothing overflows.",
        )
    values = np.clip(frames, 0, 1)
    values *= 255
    return np.asarray(np.rint(values, out=values), dtype=np.uint8)


def check_output(path: Path, width: int, height: int, frames: int) -> None:
    """Refuses, before any work, an output that could not be written at the end. Leaves nothing behind.

    Raises RequestError (not .mp4, a folder, folder missing or not writable, name too long), ResourceError
    (less free disk than about 0.2 bytes a pixel), PlatformError (no ffmpeg).
    """
    if path.suffix.lower() != ".mp4":
        raise RequestError(f"--output {path} does not end in .mp4.", "The name needs that ending.")
    folder = path.absolute().parent
    try:
        for name in (path, settings_path(path)):
            if name.is_dir():
                raise RequestError(f"--output: {name} is a folder.", "Name another file.")
        if not folder.is_dir():
            raise RequestError(f"The folder of --output, {folder}, does not exist.", f"Make it: mkdir -p '{folder}'")
        with suppress(FileNotFoundError):
            os.lstat(settings_path(path))  # raises for a name that the file system does not take
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:
        raise RequestError(f"--output {path} cannot be written: {error}.", "Choose another one.") from error
    needed = round(frames * width * height * BYTES_A_PIXEL) + DISK_MARGIN
    if free < needed:
        raise ResourceError(
            f"{folder} has {free >> 20} MiB free; {frames} frames of {width}x{height} may need {needed >> 20} MiB.",
            "Free some space or write to another disk.",
        )
    _ffmpeg()


def settings_path(path: Path) -> Path:
    """Where the settings of a video lie as JSON: OUTPUT.mp4.json."""
    return path.with_name(path.name + ".json")


def write_video(frames: Iterable[Frame], path: Path, fps: int, settings: dict[str, Any]) -> int:
    """Encodes frames [H, W, 3] (H and W even, all alike) as they come; returns how many there were. A frame must not
    change afterwards.

    Replaces `path` and its JSON at the very end. If anything fails, the iterator included, nothing is left
    and the encoder is gone. Raises PlatformError with ffmpeg's last lines, ResourceError if the disk is full.
    """
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise ValueError("no frames")
    path = path.absolute()
    height, width = first.shape[:2]
    with (
        hidden(path, ".mp4") as video,
        hidden(path, ".json") as beside,
        hidden(path, ".txt") as comment,
    ):
        beside.write_text(_json(settings, indent=2) + "\n", encoding="utf-8")
        comment.write_text(_ffmetadata(_json(settings)), encoding="utf-8", newline="\n")
        with _encoder(_command(video, comment, width, height, fps)) as encode:
            count = 0
            for frame in chain([first], iterator):
                if frame.shape != (height, width, 3) or frame.dtype not in (np.uint8, np.float32):
                    raise ValueError(f"frame {count} is {frame.dtype} {frame.shape}, the first {first.shape}")
                encode(frame)
                count += 1
        land(video, path)
        land(beside, settings_path(path))
    return count


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a video that `write_video` made: from the mp4 itself, or else from the JSON beside it;
    or from such a JSON file named directly. Raises RequestError if there is none to be read."""
    if not path.is_file():
        raise RequestError(f"{path} is not a file.", "Name a video (or its .json) that this program made.")
    beside = path if path.suffix.lower() == ".json" else settings_path(path)
    texts = [] if path == beside else [_comment(path)]
    if beside.is_file():
        texts.append(beside.read_text(encoding="utf-8", errors="replace"))
    for text in texts:
        try:
            settings = json.loads(text)
        except ValueError:
            continue
        if isinstance(settings, dict):
            return settings
    raise RequestError(f"{path} carries no settings.", "Use a video as this program wrote it.")


def _json(settings: dict[str, Any], indent: int | None = None) -> str:
    """JSON in valid Unicode: a path may hold bytes that are none, which JSON writes as `\\udcXX`."""
    return json.dumps(settings, ensure_ascii=False, indent=indent).encode(errors="backslashreplace").decode()


def _command(video: Path, comment: Path, width: int, height: int, fps: int) -> list[str]:
    """ffmpeg with raw RGB frames on its standard input. The comment is a file: arguments have a limit."""
    raw = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -framerate {fps} -i pipe:0".split()
    convert = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"
    codec = f"-c:v libx264 -preset medium -crf {CRF} -pix_fmt yuv420p".split()
    container = ["-map_metadata", "1", "-movflags", "+faststart", "-f", "mp4", f"file:{video}"]
    inputs = [*raw, "-f", "ffmetadata", "-i", f"file:{comment}", "-map", "0:v"]
    return [_ffmpeg(), "-y", "-v", "error", *inputs, "-vf", convert, *codec, *BT709, *container]


@contextmanager
def _encoder(command: list[str]) -> Iterator[Callable[[Frame], None]]:
    """Runs ffmpeg and yields what takes its frames; at the end waits for it and checks that it succeeded."""
    with tempfile.TemporaryFile() as log, ThreadPoolExecutor(1, "encode") as thread:
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)
        except OSError as error:
            raise PlatformError(f"ffmpeg does not start: {error}.", REINSTALL) from error
        assert process.stdin is not None
        waiting = _Waiting(thread, process.stdin)
        try:
            try:
                yield waiting.add
                waiting.end()
                process.stdin.close()
            except BrokenPipeError as error:  # ffmpeg gave up first: its log says why
                raise _ffmpeg_failed(process.wait(), log) from error
            if process.wait() != 0:
                raise _ffmpeg_failed(process.returncode, log)
        finally:
            process.kill()  # and with it a write that the thread is in
            process.wait()
            thread.shutdown(cancel_futures=True)
            with suppress(BrokenPipeError):  # closing flushes what a dead reader cannot take
                process.stdin.close()


class _Waiting:
    """Frames on their way into a pipe, which a thread fills. What fails there is raised by the next call here."""

    def __init__(self, thread: ThreadPoolExecutor, pipe: IO[bytes]) -> None:
        self._thread, self._pipe = thread, pipe
        self._frames: deque[Future[None]] = deque()

    def add(self, frame: Frame) -> None:
        while self._frames and (self._frames[0].done() or len(self._frames) >= AHEAD):
            self._frames.popleft().result()
        self._frames.append(self._thread.submit(self._write, frame))

    def end(self) -> None:
        while self._frames:
            self._frames.popleft().result()

    def _write(self, frame: Frame) -> None:
        """A decoded frame lies in planes: one after the other is twice as fast as the transposed whole."""
        if frame.dtype != np.uint8:
            frame = np.stack([to_uint8(frame[..., channel].astype(np.float32, copy=False)) for channel in range(3)], -1)
        self._pipe.write(np.ascontiguousarray(frame).data)


def _ffmpeg_failed(code: int, log: IO[bytes]) -> PlatformError | ResourceError:
    if code < 0:
        ended = f"ffmpeg was ended from outside, by signal {-code} ({signal.strsignal(-code)})"
        return ResourceError(ended, SIGNALS.get(-code, "Run it again; latents that were saved need only be decoded."))
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()[-12:]
    text = f"ffmpeg failed with status {code}:\n  " + "\n  ".join(lines or ["(it said nothing)"])
    if any("No space left" in line for line in lines):
        return ResourceError(text, "The disk is full: free some space or write to another disk.")
    return PlatformError(text, REINSTALL)


def _ffmpeg() -> str:
    """The ffmpeg of imageio-ffmpeg, which a wheel brings along (or IMAGEIO_FFMPEG_EXE names)."""
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        raise PlatformError(f"No ffmpeg: {error}.", "Run: pip install imageio-ffmpeg") from error


def _comment(path: Path) -> str:
    """The `comment` of a media file's metadata; empty if there is none or it is no media file."""
    command = [_ffmpeg(), "-v", "error", "-i", f"file:{path.absolute()}", "-f", "ffmetadata", "pipe:1"]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    text = run.stdout.decode("utf-8", "replace")
    found = re.search(r"^comment=((?:\\.|[^\\\n])*)$", text, re.MULTILINE | re.DOTALL)
    return re.sub(r"\\(.)", r"\1", found[1], flags=re.DOTALL) if found else ""


def _ffmetadata(comment: str) -> str:
    """A metadata file as ffmpeg reads it: = ; # \\ and line ends are escaped by a backslash."""
    return ";FFMETADATA1\ncomment=" + re.sub(r"([=;#\\\n])", r"\\\1", comment) + "\n"
