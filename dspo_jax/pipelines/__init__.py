"""A text-to-image model as one value."""
