"""Checkpoints: what a trained model on disk is, read without loading its weights."""
