"""What a run did, as one page of HTML that needs nothing else: no network, no script, light and dark, fit for paper.

read.py     metrics.jsonl, events.jsonl, run.json -> `Run`
series.py   numbers by step: thinning that keeps peaks, smoothing, an axis that a spike does not flatten
panels.py   which curves there are, from the columns that are there
draw.py     a panel -> SVG whose colours are the page's
heat.py     experts' loads -> maps
page.py     the page around them; style.py its looks
"""

from karakoram.train.report.page import write_report
from karakoram.train.report.read import Run, find_runs, read_run

__all__ = ["Run", "find_runs", "read_run", "write_report"]
