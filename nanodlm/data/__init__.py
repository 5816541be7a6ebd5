"""Turn any source into rows of token ids: download, tokenizer, split, shards, loader."""
