"""Nouns and rules of the gateway. Nothing here does I/O."""
