"""What a run survives: kills, power cuts, full disks, damaged files, second starts, signals, long runs, random bytes.

`python -m tests.torture` runs all of it and writes docs/reliability.md; `test_short.py` is the part that CI runs.
"""
