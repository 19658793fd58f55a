"""What a model may write: JSON, schemas, regular expressions, and K2's tool-call section. Start at `output.py`."""
