"""Load a model and continue a text, token by token. Raw text, no chat format.

    python examples/load_and_generate.py [CHECKPOINT_DIRECTORY]

Without an argument the bundled nano model is used.
"""

import sys
from pathlib import Path

import karakoram
from karakoram.env import bundled_model_dir

path = Path(sys.argv[1]) if len(sys.argv) > 1 else bundled_model_dir()
tokenizer = karakoram.Tokenizer.from_dir(path)
model = karakoram.load_model(str(path), dtype="bfloat16")

prompt = "12 + 30 ="
print(prompt, end="", flush=True)
new_ids: list[int] = []
for token_id in karakoram.generate(model, tokenizer.encode(prompt), max_new_tokens=24):
    new_ids.append(token_id)
print(tokenizer.decode(new_ids))
print(f"{len(new_ids)} tokens from {model.config.family}")
