"""``python -m sparse_mhsa.bench``."""

import sys

from .speed import main

sys.exit(main())
