"""Sub-models: the first layers and leading dims of a checkpoint, as a folder of their own."""
