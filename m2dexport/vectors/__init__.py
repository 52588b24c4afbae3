"""Vectors: their codes, their ranking, their quality; numpy and scipy only."""
