"""Alignment: one linear map per depth, into the space of the full depth's vectors."""
