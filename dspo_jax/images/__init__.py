"""Image files and arrays: decoding, resizing, contact sheets."""
