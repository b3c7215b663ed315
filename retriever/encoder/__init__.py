"""Two towers over Hugging Face models: pooling, normalisation, export."""
