"""Slice, quantize, profile and bundle 2D Matryoshka sentence-embedding models."""

__version__ = "0.1.0"
