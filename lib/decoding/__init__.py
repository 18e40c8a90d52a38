"""Decoding: what is kept of the past, and how the next token is drawn."""
