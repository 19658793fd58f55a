"""Training data: generated dialogs with tools, GSM8K rewritten into calculator calls, plain text, and the tokenizer's
merges."""
