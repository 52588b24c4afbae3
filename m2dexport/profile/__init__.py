"""Profiles: what every cell gives and costs, and which one a budget buys."""
