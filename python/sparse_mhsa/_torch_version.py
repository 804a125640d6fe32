"""The one check that must run before the compiled core is loaded."""

import torch

BUILT_FOR = "2.13"
"""The torch release line whose C++ ABI the core is linked against; `pyproject.toml` pins the same one."""


def check_torch(found: str = torch.__version__) -> None:
    """Refuse a torch that the compiled core would crash with.

    libtorch's C++ ABI changes between minor releases, so the extension must not even be loaded beside another
    one.

    Args:
        found: version of the torch to judge, for example ``"2.13.0+cpu"``.

    Raises:
        ImportError: ``found`` is of another release line than the core was built for.
    """
    if found.split(".")[:2] != BUILT_FOR.split("."):
        raise ImportError(
            f"sparse_mhsa was built for torch {BUILT_FOR}.*, found torch {found}. "
            f"Install the matching one with: pip install 'torch=={BUILT_FOR}.*'"
        )
