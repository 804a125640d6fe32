"""``python -m sparse_mhsa.bench``: the same as ``sparse-mhsa bench kernels``."""

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "kernels", *sys.argv[1:]]))
