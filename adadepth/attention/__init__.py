"""The bridge between a block's attention and the loop: token sets, views, and how attention calls are caught."""
