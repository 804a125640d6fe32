"""The options of ``sparse-mhsa bench``."""

# `option` is `dataclasses.field` with metadata, so it makes no shared default.
# ruff: noqa: RUF009

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import configs
from ..train import UsageError
from ..train.options import SEEDS, Options, option

DTYPES = ("float32", "bfloat16", "float16", "float64")
QUICK_BUDGET = 0.8
"""Seconds that a method may take per row with ``--quick``."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure, how long, and where to write it.

    Attributes:
        rows: shell patterns of row names; all rows, or those of ``quick``, if empty.
        dtypes: names of torch dtypes.
        quick: a subset of rows and methods that takes less than two minutes on two cores.
        repeat: turns per row.
        budget: seconds that a method may take per row.
        threads: torch's threads; as they are if ``None``.
        memory: also measure extra memory and first-call cost, in processes of their own.
        plots: also draw.
        output_dir: where the files go.
    """

    rows: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)
    quick: bool = False
    repeat: int = 15
    budget: float = 4.0
    threads: int | None = None
    memory: bool = True
    plots: bool = True
    output_dir: Path = Path("runs/bench")

    def __post_init__(self) -> None:
        for name in self.dtypes:
            if name not in DTYPES:
                raise UsageError(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
        if self.repeat < 1:
            raise UsageError(f"--repeat must be at least 1, got {self.repeat}")
        if not self.budget > 0:
            raise UsageError(f"--budget must be above 0, got {self.budget}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads must be at least 1, got {self.threads}")


GPU_EXAMPLES = tuple(
    f"sparse-mhsa bench accuracy --nproc-per-node 8 -- --dataset {dataset} --data-path {folder} --device cuda --model "
    "vit_base_patch16_224 --cls-token --input-size 224 --epochs 100 --layer-decay 0.75 --drop-path 0.2 --reprob 0.25 "
    "--finetune mae_pretrain_vit_base.pth"
    for dataset, folder in (
        ("cifar10", "data"),
        ("cifar100", "data"),
        ("tinyimagenet", "tiny-imagenet-200"),
        ("imagenet", "imagenet"),
    )
)
"""The accuracy table for the data sets of the published one, on a machine with eight GPUs."""


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions(Options):
    """``sparse-mhsa bench accuracy``."""

    methods: tuple[str, ...] = option((), "rows of the table (default: all)", metavar="NAME")
    seeds: tuple[int, ...] = option((0, 1, 2), "one run per method and seed", at_least=0, below=SEEDS, metavar="SEED")
    budget: float | None = option(
        None, "attention GMACs per image of every method; by default, those of Fibottention as published", above=0
    )
    jobs: int = option(1, "runs at a time, each in a process of its own", at_least=1)
    nproc_per_node: int = option(1, "processes per run, started by torchrun", at_least=1)
    threads: int | None = option(None, "threads of a run (default: torch's own number)", at_least=1)
    output_dir: Path = option(Path("runs/accuracy"), "where the runs and the table go", metavar="DIR")
    dry_run: bool = option(
        False,
        "print each method's parameter and cost, the commands of the runs and whether --output-dir can be written, and "
        "run nothing",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"--seeds must be different, got {' '.join(map(str, self.seeds))}")


@dataclass(frozen=True, kw_only=True)
class LatencyOptions(Options):
    """``sparse-mhsa bench latency``."""

    attn_cfg: Path = option(
        configs()["fibottention"],
        "attention configuration of the mask, a file or a name from `config list`",
        metavar="YAML",
    )
    tokens: tuple[int, ...] = option((197, 577, 1025, 4097, 16385, 65537), "numbers of tokens", at_least=2, metavar="N")
    batches: tuple[int, ...] = option((1, 8), "batch sizes", at_least=1, metavar="B")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = option("float32", "element type")
    repeat: int = option(15, "turns per row", at_least=1)
    budget: float = option(4.0, "seconds that one method may take per row", above=0)
    limit: float = option(30.0, "seconds above which one call of a quadratic method is left out", above=0)
    memory: bool = option(False, "also measure extra memory, in processes of their own")
    threads: int | None = option(None, "threads (default: torch's own number)", at_least=1)
    output_dir: Path = option(Path("runs/latency"), "where latency.json, .md and .png go", metavar="DIR")
