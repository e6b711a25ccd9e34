"""Text-to-image models: a diffusers folder as one value, families of models, loading, tokenizers."""
