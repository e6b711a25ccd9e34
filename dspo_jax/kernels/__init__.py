"""Attention and layers in the forms that a device computes fast."""
