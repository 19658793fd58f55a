"""How fast this package trains, beside transformers on the same machine in the same minutes.

order.py     what is measured: shapes, and who computes them;  process.py   one candidate in a process of its own
ours.py, theirs.py   what such a process runs;  child.py   its loop
step.py      `k2 bench train`;  layer.py   `k2 bench train --layer`
"""
