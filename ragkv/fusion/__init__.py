"""One prompt: where everything stands in it, stored keys and values at their places, and the pass over the rest."""
