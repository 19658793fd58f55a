"""Finished weights in other bits.

`convert.py` changes the representation and never a value; `round_to_nearest.py` chooses new values, the plainest way.
"""
