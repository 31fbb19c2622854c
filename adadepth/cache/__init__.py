"""Keys and values of tokens seen before: the cache, its layouts, and the tokens and view of a pass with it."""
