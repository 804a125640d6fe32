"""Optional packages, and what is said where one is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

_EXTRAS = {"ipywidgets": "notebook", "matplotlib": "plot", "timm": "timm", "transformers": "hf"}


@contextmanager
def needed_for(purpose: str, package: str) -> Iterator[None]:
    """Around the import of an optional package: where it is missing, say what needs it and how to get it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        # A package that lacks something else says best itself what that is.
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ImportError(f"{purpose} needs {package}: pip install 'sparse_mhsa[{_EXTRAS[package]}]'") from error
