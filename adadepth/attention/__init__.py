"""The connection between a block's attention and the loop: token sets, views, and the catch of attention calls."""
