"""Tokens in, tokens out: many requests at once over one model, one latent cache and one thread. Start at `engine.py`."""
