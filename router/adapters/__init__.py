"""Everything that talks to the outside: databases, caches, providers."""
