"""What turns gradients into new weights: Muon, AdamW, the clip of attention logits, the learning rate over a run."""
