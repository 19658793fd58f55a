"""Checkpoints of a training run: what is kept, how it is written beside the training, how it is read again.

    OUT/checkpoints/step-00001200/
        model/shard-RANK-model-N-of-N.safetensors    masters, optimizer state, biases: each rank's own pieces
        state.json                                   the run's counters; every tensor's dtype and shape
        hf/                                          where it is wanted: the model as anything opens it

A directory of that name is complete: it was written under a hidden name, flushed and renamed. Nothing in it is pickled.
"""
