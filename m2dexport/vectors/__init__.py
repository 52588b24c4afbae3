"""Vectors: their codes, search, evaluation data and quality; numpy and scipy only."""
