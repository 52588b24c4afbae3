"""Build: slice, export, quantize and check, until an artifact is worth handing over."""
