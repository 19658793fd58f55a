"""After pretraining: low-rank adapters on a frozen model, and learning from a larger model's distributions."""
