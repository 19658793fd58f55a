"""A model spread over devices: which rank holds what, and what ranks tell one another."""
