"""What a run leaves besides weights: its directory and settings, its metrics, sinks of others' making."""
