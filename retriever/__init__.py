"""Dense retrieval training with batches of any size: gradient cache and tiled contrastive loss."""

from retriever.own_kernels import find_own_kernels

find_own_kernels()
