"""Log-sum-exp over query-passage similarities, tile by tile."""
