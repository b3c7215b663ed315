"""A transformer layer's parts, and BERT's layer and embeddings from them."""
