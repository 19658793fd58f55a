"""Routed experts in whatever memory there is: accelerator, RAM, disk; moved by what the model asks for."""
