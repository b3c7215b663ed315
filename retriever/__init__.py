"""Dense retrieval training with batches of any size: gradient cache and tiled contrastive loss."""
