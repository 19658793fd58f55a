"""A model whose experts do not all fit: decode, first token and prefill under budgets, against what the disk allows."""
