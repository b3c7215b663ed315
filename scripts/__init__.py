"""Commands around training: demo, data builders, benchmarks."""
