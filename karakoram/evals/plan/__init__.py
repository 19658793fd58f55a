"""What a model will do on a machine before it is loaded (`k2 plan`): its placement, its speed, and what limits it.

    machine.py   what was measured here, and is kept; how: kernels.py, disk.py; in which form: rates.py
    workload.py  what a model asks for: bytes and weights, by configuration or checkpoint
    hits.py      how many experts are found in memory: of a recorded trace, or of typical routing
    predict.py   the time of a token and of a prompt, from those three
    report.py    budgets, placement, what would help;  plan.py  from a name to the report
    training.py  how a model would be trained on many GPUs, on paper;  training_lines.py  that, for people

`docs/expert-plan.md` has the model of time and how far it is from what was measured, `docs/scale.md` the training.
"""
