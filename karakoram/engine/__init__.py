"""Tokens in, tokens out: many requests at once over one model and one latent cache. Start at `engine.py`."""
