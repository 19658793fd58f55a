"""Checkpoints by chance (`k2 synth`): a preset's true names, shapes and formats, and experts chosen as published models
choose them. For benchmarks of disks, caches and prefetching; as a model it is meaningless.

How routing gets its statistics, from the weights alone:

  three blocks   The hidden dimensions are 32 that hold one constant, a quarter that is *slow*, and the rest, which is
                 *fast*. A token's embedding fills the fast ones. Attention reads the fast ones and writes the slow
                 ones: the mean over the last few tokens (`recency.py`), which changes slowly. Feed-forward layers read
                 both and write the fast ones.
  popularity     `e_score_correction_bias`, in the router's selection only: the published curve (`routing.py`).
  repetition     A share of each router row lies on the slow dimensions. What is slow is nearly the same for the next
                 token, so the scores of neighbouring tokens correlate.
  next layer     Every layer adds the same share to the variance of the residual stream (it grows exponentially, as in
                 trained models), so that the next layer's router, applied one layer early, sees a correlated input.

Correlations and biases are solved for the preset's number of experts by simulating the scores (`routing.py`), the
weights that have them follow from variances (`stream.py`, `patterns.py`), and `measure.py` runs the model to see.
"""
