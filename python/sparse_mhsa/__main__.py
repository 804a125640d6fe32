"""``python -m sparse_mhsa``."""

import sys

from .cli import main

sys.exit(main())
