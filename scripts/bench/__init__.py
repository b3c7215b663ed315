"""Benchmarks: one command for each table of `docs/bench`, and the report that makes the pages."""
