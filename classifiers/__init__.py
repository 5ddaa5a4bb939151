"""Prompt encoders and heads. A leaf package: it imports nothing of `router`."""
