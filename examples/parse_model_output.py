"""Turn what a model writes back into a message, as it streams in, however it is cut into pieces. Loads no torch.

python examples/parse_model_output.py
"""

import json
import sys

import karakoram
from karakoram.env import bundled_model_dir

fmt = karakoram.load_chat_format(bundled_model_dir())
written = (
    "The user wants a product.</think>One moment."
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.calculator:0<|tool_call_argument_begin|>"
    '{"expression": "48 * 17"}<|tool_call_end|><|tool_calls_section_end|>'
)

parser = fmt.parser(thinking=True)
for start in range(0, len(written), 7):  # pieces of seven characters, right through the markers
    for delta in parser.feed_text(written[start : start + 7]):
        print(json.dumps(delta))
message = parser.finish("stop")
print(json.dumps(message, indent=2))
assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"expression": "48 * 17"}
assert "torch" not in sys.modules
