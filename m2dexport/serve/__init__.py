"""An embeddings server for one bundle, as OpenAI's clients know it; needs the extra ``serve``."""
