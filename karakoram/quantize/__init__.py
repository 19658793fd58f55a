"""Finished weights in other bits.

`convert.py` changes the representation and never a value; `quantize.py` chooses new values, the plainest way
(`round_to_nearest.py`), and accounts for it (`report.py`, `perplexity.py`). What both do is in `weights.py`.
"""
