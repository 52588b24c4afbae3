"""Timing, memory and the machine that they were measured on: what profile and bench share."""
