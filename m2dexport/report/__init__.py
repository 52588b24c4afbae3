"""Looking at a profile: pictures, a page that opens offline, the section of a model card."""
