"""``python -m lp_inductor``."""

from __future__ import annotations

import sys

from lp_inductor.cli import main

if __name__ == "__main__":
    sys.exit(main())
