"""Commands around training: demo, data builders, benchmarks."""

import retriever  # noqa: F401 (before any module of `kernels`, so that these are ours)
