"""Training: what the `sparse-mhsa finetune` and `sparse-mhsa demo` commands run.

Nothing here is needed to use sparse attention; it needs the packages of ``pip install sparse_mhsa[train]``.
"""

from importlib.util import find_spec

__all__ = ["DataError", "LoaderError", "TrainingError", "UsageError", "require_packages"]


class UsageError(ValueError):
    """An option, a path, a data set or a checkpoint that cannot be used as given."""


class DataError(UsageError):
    """An image that cannot be read, found while training."""


class TrainingError(RuntimeError):
    """A run that started well and cannot go on."""


class LoaderError(TrainingError):
    """A process that loads images has ended."""


_EXTRAS = {"av": "video", "skvideo": "video", "onnx": "dinov2"}
"""Which extra brings a package, and all that is needed with it, where it is not ``train``."""


def require_packages(*names: str) -> None:
    """Refuse to start without the optional packages that a command needs.

    Args:
        names: import names of the packages.

    Raises:
        UsageError: one of them is not installed.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        extra = next((_EXTRAS[name] for name in missing if name in _EXTRAS), "train")
        raise UsageError(
            f"{', '.join(missing)} is not installed; install what training needs with: "
            f"pip install 'sparse_mhsa[{extra}]'"
        )
