"""Other programs that run what was built, each with the folder that it opens as it is."""
