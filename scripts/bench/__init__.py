"""One file per table of `docs/bench`."""
