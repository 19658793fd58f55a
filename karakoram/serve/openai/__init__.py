"""OpenAI's API: chat completions, text completions, and vLLM's pages for tokens that speak the same dialect."""

from karakoram.serve.openai.chat import ChatCompletions
from karakoram.serve.openai.text import Completions

SURFACES = (ChatCompletions(), Completions())
