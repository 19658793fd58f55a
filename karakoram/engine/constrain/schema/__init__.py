"""From a JSON Schema to a grammar: `document.py` (keywords, references), `kinds.py` (what a schema allows, type by
type), `build.py` (the grammar). Start at `build.py`."""
