"""Is the answer to one prompt the right answer to another? Pair features, guard, verifier and its error bound."""
