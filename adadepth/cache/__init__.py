"""Keys and values of past tokens: the cache, its layouts, and the tokens and the view of a pass with a cache."""
