"""The contrastive loss over query–passage similarities, and its gradients, tile by tile."""
