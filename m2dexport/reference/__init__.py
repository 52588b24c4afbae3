"""The torch original: what everything else is compared with."""
