"""Engines: one module each, with the same few functions."""
