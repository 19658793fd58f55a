"""One's own data: documents from files and tables, tokenised once into shards, packed into rows, mixed by weight.

    source (lines.py, tables.py) → records (records.py) → samples (conversations.py) → shards (build.py, shards.py)
    → rows (packing.py) → batches (mixture.py)

Nothing is imported here: the processes that tokenise need no torch.
"""
