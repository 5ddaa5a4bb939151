"""Farthing: a cost-aware LLM gateway."""
