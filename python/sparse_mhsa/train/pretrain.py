"""``sparse-mhsa pretrain``: a masked autoencoder, with sparse attention in encoder and decoder or without."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import require_packages
from .checkpoint import read_checkpoint, seed_everything
from .datasets import load_data
from .distributed import World
from .recipes import PretrainOptions

require_packages("timm", "torchvision", "tqdm", "matplotlib")

from . import figures  # noqa: E402
from .engine import Trainer  # noqa: E402
from .finetune import (  # noqa: E402
    attention_text,
    describe,
    image_costs,
    run,
    sparsify_model,
    started,
)
from .mae import MaskedAutoencoder, masked_autoencoder  # noqa: E402
from .models import load_initial_weights  # noqa: E402
from .resume import resolve_attention  # noqa: E402
from .run_page import write_run_page  # noqa: E402
from .tasks import Task, adamw  # noqa: E402

logger = logging.getLogger("sparse_mhsa")

TEST_MASKS = 0
"""Seed of the patches that are removed from the test images: the same in every epoch and every run."""


@dataclass(frozen=True)
class Pretrained:
    """A finished pretraining."""

    model: MaskedAutoencoder
    trainer: Trainer
    results: dict[str, Any]
    report: Path | None
    """The page with the pictures; None after a dry run and in the other processes of a distributed run."""


class Reconstruction(Task):
    """Mean squared error of the removed patches."""

    name = "pretrain"

    def __init__(self, options: PretrainOptions) -> None:
        self.options = options

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW with the second beta of MAE."""
        return adamw(model, self.options, beta2=0.95)

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """The reconstruction loss of a random masking; labels are not looked at."""
        loss: Tensor = model(images)
        return loss, 0

    def test(self, model: nn.Module, batches: Iterable[Any], world: World) -> dict[str, float]:
        """The mean reconstruction loss, with the same patches removed every time."""
        assert isinstance(model, MaskedAutoencoder)
        generator = torch.Generator().manual_seed(TEST_MASKS)
        total, images = 0.0, 0
        for image, _ in batches:
            loss, _, _ = model.reconstruct(image, _noise(model, len(image), generator).to(image.device))
            total += loss.item() * len(image)
            images += len(image)
        return {"test_loss": total / images}


def pretrain(options: PretrainOptions, command: str) -> Pretrained:
    """Train the masked autoencoder that ``options`` describe and write ``report.html``.

    Args:
        options: the recipe.
        command: what the user typed; the report quotes it.

    Raises:
        UsageError: an option, path, data set or checkpoint cannot be used as given.
        ConfigError: an attention configuration cannot be honoured.
        TrainingError: the loss became infinite or NaN.
        Interrupted: Ctrl-C was pressed; the last checkpoint continues after the last finished step.
    """
    with started(options) as (options, world):
        return _pretrain(options, world, command)


def _pretrain(options: PretrainOptions, world: World, command: str) -> Pretrained:
    seed_everything(options.seed)
    state = read_checkpoint(options.resume, "pretrain") if options.resume else None
    attention = {
        "attention": attention_text(options.attn_cfg),
        "decoder_attention": attention_text(options.decoder_attn_cfg, "--decoder-attn-cfg"),
    }
    if state is not None and options.resume is not None:
        paths = {"attention": options.attn_cfg, "decoder_attention": options.decoder_attn_cfg}
        attention = {
            name: resolve_attention(state, options.resume, paths[name], text, name) for name, text in attention.items()
        }
    data = load_data(options)
    model = masked_autoencoder(options, data)
    if options.finetune is not None:
        load_initial_weights(model, options.finetune)
    model.to(world.device)
    for name, include, flag in (
        ("attention", r"^blocks\.", "--attn-cfg"),
        ("decoder_attention", r"^decoder_blocks\.", "--decoder-attn-cfg"),
    ):
        text = attention[name]
        if text is not None:
            sparsify_model(model, text, options, include, flag)
    trainer = Trainer(model, data, options, Reconstruction(options), attention, world)
    describe(trainer)
    logger.info("the encoder sees %.0f %% of the patches while training", 100 * (1 - options.mask_ratio))
    seed_everything(options.seed + world.rank)
    results = run(trainer, options, state, image_costs(model))
    report = None
    if world.is_first and not options.dry_run:
        report = write_report(trainer, model, command)
        logger.info("report: %s", report)
    return Pretrained(model, trainer, results, report)


@torch.no_grad()
def write_report(trainer: Trainer, model: MaskedAutoencoder, command: str) -> Path:
    """Write ``report.html``: the curve, and what becomes of the first test image of every class, ten at most.

    Where there are no classes, the first ten images are shown.
    """
    data, options = trainer.data, trainer.options
    assert isinstance(options, PretrainOptions)
    firsts: dict[int, Tensor] = {}
    classes = data.num_classes > 1
    for index in range(data.sizes[1]):
        image, label = data.test[index]
        firsts.setdefault(int(label) if classes else index, image)
        if len(firsts) == (min(figures.SHOWN_CLASSES, data.num_classes) if classes else figures.SHOWN_CLASSES):
            break
    images = torch.stack([firsts[label] for label in sorted(firsts)]).to(trainer.device)
    noise = _noise(model, len(images), torch.Generator().manual_seed(TEST_MASKS)).to(images.device)
    model.eval()
    _, restored, removed = model.reconstruct(images, noise)
    target = model.patchify(images)
    if options.norm_pix_loss:
        # Predicted is what a patch looks like apart from its own mean and spread, which are taken from the image here.
        spread = (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        restored = restored * spread + target.mean(-1, keepdim=True)
    hidden = removed[..., None].bool()
    rows = {
        "image": images,
        "what the encoder sees": model.unpatchify(target.masked_fill(hidden, 0.0)),
        "restored": model.unpatchify(restored),
        "restored beside what was seen": model.unpatchify(torch.where(hidden, restored, target)),
    }
    pictures = {name: [figures.pixels(x.cpu(), data.mean, data.std) for x in batch] for name, batch in rows.items()}
    about = (
        f"{options.model} on {options.dataset}: {data.sizes[0]:,} training and {data.sizes[1]:,} test images, "
        f"{options.mask_ratio:.0%} of the patches removed, "
        f"{'sparse attention' if any(trainer.attention.values()) else 'dense attention'}. Test loss "
        f"{trainer.history[-1]['test_loss']:.4f} (best {trainer.best_value:.4f}), mean squared error of the removed "
        f"patches {'after normalising each' if options.norm_pix_loss else 'of normalised images'}."
    )
    shown = f"""<h2>Test images</h2><p>The first test image{" of every class" if classes else "s"}; the same patches
are removed in every run.</p>
<figure>{figures.picture_rows(pictures)}</figure>"""
    return write_run_page(trainer, "Masked autoencoder", about, image_costs(model), command, shown)


def _noise(model: MaskedAutoencoder, batch: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, model.patch_embed.num_patches, generator=generator)
