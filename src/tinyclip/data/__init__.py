"""Image-caption data: specs, sources, the built-in scenes, and the loader."""
