"""What the commands share of the terminal: reading lines, showing a stream, a conversation, progress."""
