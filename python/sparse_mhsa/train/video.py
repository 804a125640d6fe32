"""``sparse-mhsa video``: a TimeSformer, with a mask on its attention along space, along time or over both."""

import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._core import ConfigError
from ..adapters import find_attention
from ..config import load_config
from ..flops import AttentionCost, attention_cost
from . import UsageError, require_packages
from .checkpoint import read_checkpoint, seed_everything
from .clips import Clips, load_clips
from .datasets import ImageData
from .distributed import World
from .recipes import MASKABLE, VideoOptions

require_packages("timm", "torchvision", "tqdm", "matplotlib")

from . import figures  # noqa: E402
from .engine import Trainer  # noqa: E402
from .finetune import attention_text, run, sparsify_model, started  # noqa: E402
from .models import load_state  # noqa: E402
from .resume import resolve_attention  # noqa: E402
from .run_page import write_run_page  # noqa: E402
from .tasks import Classification, adamw  # noqa: E402
from .timesformer import TimeSformer  # noqa: E402

logger = logging.getLogger("sparse_mhsa")


@dataclass(frozen=True)
class VideoRun:
    """A finished run."""

    model: TimeSformer
    trainer: Trainer
    results: dict[str, Any]
    report: Path | None
    """The page; None after a dry run, an evaluation, and in the other processes of a distributed run."""


class VideoClassification(Classification):
    """Cross-entropy of clips."""

    name = "video"

    def __init__(self, options: VideoOptions) -> None:
        self.video_options = options
        self.smoothing, self.mixup, self.erase = options.smoothing, None, None

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW."""
        return adamw(model, self.video_options)


def video(options: VideoOptions, command: str) -> VideoRun:
    """Train the TimeSformer that ``options`` describe and write ``report.html``.

    Raises:
        UsageError: an option, path, video or checkpoint cannot be used as given.
        ConfigError: the attention configuration cannot be honoured.
        TrainingError: the loss became infinite or NaN.
        Interrupted: Ctrl-C was pressed; the last checkpoint continues after the last finished step.
    """
    with started(options) as (options, world):
        return _video(options, world, command)


def _video(options: VideoOptions, world: World, command: str) -> VideoRun:
    seed_everything(options.seed)
    state = read_checkpoint(options.resume, "video") if options.resume else None
    attention = attention_text(options.attn_cfg)
    if state is not None and options.resume is not None:
        attention = resolve_attention(state, options.resume, options.attn_cfg, attention)
    if attention is None and options.mask_on != MASKABLE[options.attention][:1]:
        raise UsageError(f"--mask-on {' '.join(options.mask_on)} needs --attn-cfg: the mask")
    data = load_clips(options)
    model = build_timesformer(options, data)
    if options.finetune is not None:
        load_state(model, options.finetune, prefix="model.")
    model.to(world.device)
    if attention is not None:
        sparsify_timesformer(model, attention, options)
    trainer = Trainer(model, data, options, VideoClassification(options), {"attention": attention}, world)
    logger.info("%s: %d training and %d test clips of %d frames", options.task, *data.sizes, options.frames)
    for about, cost, sequences in costs(model):
        logger.info("%s, %d sequences per clip: %s each", about, sequences, cost)
    seed_everything(options.seed + world.rank)
    results = run(trainer, options, state, costs(model))
    report = None
    if world.is_first and not options.dry_run and not options.eval:
        report = _write_report(trainer, model, command)
        logger.info("report: %s", report)
    return VideoRun(model, trainer, results, report)


def build_timesformer(options: VideoOptions, data: ImageData) -> TimeSformer:
    """The model for clips of ``data``.

    Raises:
        UsageError: sizes do not divide each other.
    """
    patch_size = data.patch_size
    assert patch_size is not None
    if data.input_size % patch_size:
        raise UsageError(f"--patch-size must divide the side {data.input_size} of a frame, got {patch_size}")
    return TimeSformer(
        options.frames,
        data.input_size,
        patch_size,
        data.in_chans,
        data.num_classes,
        embed_dim=options.embed_dim,
        depth=options.depth,
        num_heads=options.num_heads,
        kind=options.attention,
        drop_path=options.drop_path,
    )


def sparsify_timesformer(model: TimeSformer, attention: str, options: VideoOptions) -> None:
    """Put the mask on the attention that ``options.mask_on`` names, with the tokens laid out as they arrive there.

    What the configuration itself says about prefix and grid wins over what is known from the model, except along time,
    where there is no class token.
    """
    sample = torch.rand(
        (1, model.patch_embed.proj.in_channels, model.frames, *model.patch_embed.img_size),
        dtype=model.cls_token.dtype,
        device=model.cls_token.device,
    )
    for where in options.mask_on:
        document: dict[str, Any] = json.loads(load_config(attention).to_json())
        include = r"\.attn$"
        if where == "time":
            document |= {"num_prefix_tokens": 0, "grid": [1, model.frames]}
            include = r"\.temporal_attn$"
        elif where == "both":
            known = {"num_prefix_tokens": 1, "grid": list(model.grid)}
            document |= {name: value for name, value in known.items() if document[name] is None}
            # A mask that does not look at the grid counts tokens as they come, and refuses to be told their order.
            with suppress(ConfigError):
                document = json.loads(load_config({**document, "token_order": "t_fastest"}).to_json())
        sparsify_model(model, load_config(document).to_yaml(), options, include, sample=sample)


def costs(model: TimeSformer) -> list[tuple[str, AttentionCost, int]]:
    """What attention costs: per kind, for one sequence, and how many sequences there are in a clip."""
    frames, rows, columns = model.grid
    places = rows * columns
    along = {"attn": nn.ModuleList(), "temporal_attn": nn.ModuleList()}
    for site in find_attention(model):
        along[site.name.rpartition(".")[2]].append(site.module)
    if model.kind == "joint":
        return [("attention over space and time", attention_cost(along["attn"], 1 + places * frames), 1)]
    found = [("attention along space", attention_cost(along["attn"], 1 + places), frames)]
    if model.kind == "divided":
        found.append(("attention along time", attention_cost(along["temporal_attn"], frames), places))
    return found


@torch.no_grad()
def _write_report(trainer: Trainer, model: TimeSformer, command: str) -> Path:
    data, options = trainer.data, trainer.options
    assert isinstance(options, VideoOptions)
    clips = data.test
    assert isinstance(clips, Clips)
    first = {label: index for index, label in reversed(list(enumerate(clips.labels)))}
    labels = sorted(first)[: figures.SHOWN_CLASSES]
    shown = torch.stack([clips[first[label]][0] for label in labels])
    model.eval()
    guesses = model(shown.to(trainer.device)).argmax(1).tolist()
    rows = {
        f"is {data.class_names[label]}, said {data.class_names[guess]}": [
            figures.pixels(clip[:, frame], data.mean, data.std) for frame in range(options.frames)
        ]
        for label, guess, clip in zip(labels, guesses, shown, strict=True)
    }
    last = trainer.history[-1]
    where = f"mask on {' and '.join(options.mask_on)}" if trainer.attention["attention"] else "dense"
    task = "which film a clip is from" if options.task == "clip" else "whether a clip runs forward or backward"
    about = (
        f"Task: {task}. TimeSformer ({options.attention}, {where}), {data.sizes[0]:,} training and {data.sizes[1]:,} "
        f"test clips of {options.frames} frames. Test top-1 {last['test_acc1']:.1f} % after the last epoch, best "
        f"{trainer.best_value:.1f} %; guessing gives {100 / data.num_classes:.1f} %."
    )
    if options.data_path is None:
        about += (
            " Clips to test come from the end of each film, so they show scenes that were not trained on, but the "
            "same films."
        )
    which = "every class" if len(labels) == data.num_classes else f"the first {len(labels)} classes"
    pictures = f"<h2>The first test clip of {which}</h2><figure>{figures.picture_rows(rows)}</figure>"
    return write_run_page(trainer, "Sparse attention over video", about, costs(model), command, pictures)
