"""Fast functions on arrays, each with a plain twin: they know formats, not models."""
