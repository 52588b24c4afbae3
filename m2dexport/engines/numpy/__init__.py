"""numpy: static models, which are a table of token vectors and need no inference engine."""
