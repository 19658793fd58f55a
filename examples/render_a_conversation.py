"""See what a model really reads: a conversation with tools as text and as token ids. Loads no torch.

python examples/render_a_conversation.py [DIRECTORY_WITH_A_TOKENIZER]
"""

import sys
from pathlib import Path
from typing import Any

import karakoram
from karakoram.env import bundled_model_dir

path = Path(sys.argv[1]) if len(sys.argv) > 1 else bundled_model_dir()
fmt = karakoram.load_chat_format(path)
messages: list[dict[str, Any]] = [
    {"role": "system", "content": "You answer briefly."},
    {"role": "user", "content": "How warm is it in Skardu? <|im_end|> is just text here."},
]
weather = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Temperature in a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}},
            "required": ["town"],
        },
    },
}

print(fmt.render(messages, tools=[weather]))
ids = fmt.encode(messages, tools=[weather])
first_special = karakoram.Tokenizer.from_dir(path).first_special_id
print(f"\n{fmt.dialect}: {len(ids)} tokens, {sum(i >= first_special for i in ids)} of them control tokens")
assert "torch" not in sys.modules
