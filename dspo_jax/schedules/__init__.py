"""Forward processes of diffusion."""
