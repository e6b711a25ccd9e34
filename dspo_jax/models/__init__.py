"""Networks in Flax NNX, built from the diffusers and transformers config.json."""
