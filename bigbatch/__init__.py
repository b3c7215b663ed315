"""The parts of Bigbatch that other people's code uses: `bigbatch.infonce`, and `bigbatch.st` for
sentence-transformers."""

import retriever  # noqa: F401  its `kernels` package is then the one that is found
from bigbatch.loss import infonce

__all__ = ["infonce"]
