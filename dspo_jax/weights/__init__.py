"""Files of weights: safetensors, diffusers folders, checkpoints."""
