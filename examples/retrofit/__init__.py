"""A pretrained language model whose middle layers are looped, beside the same model trained alike without a loop."""
