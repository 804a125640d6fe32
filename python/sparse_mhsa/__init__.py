"""Sparse multi-head self-attention whose time and memory grow with the edges kept.

`SparseMHSA` stands in for `torch.nn.MultiheadAttention`, `sparsify` swaps the attention of a whole model,
`sparse_attention` is the functional form, and `Mask` shows which query attends to which key. Inside the
package ``True`` always means *keep this edge*; only `SparseMHSA.forward` takes the inverted masks of
`torch.nn.MultiheadAttention`.
"""

from ._torch_version import check_torch

check_torch()

from . import budget, masks  # noqa: E402
from ._core import AttentionConfig, ConfigError, __version__  # noqa: E402
from .adapters import Report, SparseTimmAttention, densify, sparsify  # noqa: E402
from .adapters.transformers import generation_cache  # noqa: E402
from .backends import Backend, register_backend  # noqa: E402
from .cache import KVCache  # noqa: E402
from .cache_policy import CachePolicy  # noqa: E402
from .calibration import Calibration  # noqa: E402
from .config import configs, load_config  # noqa: E402
from .content import choose_masks, recall  # noqa: E402
from .decoding import decode_attention  # noqa: E402
from .engine import engine  # noqa: E402
from .functional import sparse_attention  # noqa: E402
from .layer import set_epoch  # noqa: E402
from .layer_cache import LayerCache  # noqa: E402
from .mask import Mask  # noqa: E402
from .module import SparseMHSA  # noqa: E402
from .presence import token_positions  # noqa: E402
from .probe import calibrate  # noqa: E402
from .register import MaskContext, register_mask  # noqa: E402
from .scores import Scores, collect_scores  # noqa: E402
from .sdpa import patch_sdpa  # noqa: E402
from .solve import Solution, solve_budget  # noqa: E402

__all__ = [
    "AttentionConfig",
    "Backend",
    "CachePolicy",
    "Calibration",
    "ConfigError",
    "KVCache",
    "LayerCache",
    "Mask",
    "MaskContext",
    "Report",
    "Scores",
    "Solution",
    "SparseMHSA",
    "SparseTimmAttention",
    "__version__",
    "budget",
    "calibrate",
    "choose_masks",
    "collect_scores",
    "configs",
    "decode_attention",
    "densify",
    "engine",
    "generation_cache",
    "load_config",
    "masks",
    "patch_sdpa",
    "recall",
    "register_backend",
    "register_mask",
    "set_epoch",
    "solve_budget",
    "sparse_attention",
    "sparsify",
    "token_positions",
]
