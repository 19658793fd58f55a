"""Tools that run inside the process: what `k2 chat --demo-tools` declares and what training dialogs call.

`BUILTIN` maps the name to the tool, in the order in which they are declared to a model; `call(tool, arguments_json)`
runs one on text that a model wrote and never raises. Only the standard library is used, and nothing here touches files
or the network.
"""

from karakoram.tools.calculator import CALCULATOR
from karakoram.tools.dates import DATE_ADD, DATE_DIFFERENCE, WEEKDAY
from karakoram.tools.schema import validate
from karakoram.tools.tool import Tool, ToolError, call, parse_arguments
from karakoram.tools.units import CONVERT

BUILTIN: dict[str, Tool] = {tool.name: tool for tool in (CALCULATOR, DATE_ADD, DATE_DIFFERENCE, WEEKDAY, CONVERT)}

__all__ = ["BUILTIN", "Tool", "ToolError", "call", "parse_arguments", "validate"]
