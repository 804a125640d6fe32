"""The options of ``sparse-mhsa bench kernels``."""

from dataclasses import dataclass
from pathlib import Path

from ..train import UsageError

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
