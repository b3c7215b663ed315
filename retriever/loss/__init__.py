"""The contrastive objective and the strategies that compute it over many ranks."""
