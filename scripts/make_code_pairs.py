"""The earlier name of `scripts.make_pairs`."""

from __future__ import annotations

import sys

from scripts.make_pairs import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
