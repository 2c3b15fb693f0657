"""Images: sources, packed files, transforms, samplers."""
