"""Foreign models in, trained runs out."""
