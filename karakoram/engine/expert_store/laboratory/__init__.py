"""What is done with traces: replays under any policy, and statistics."""
