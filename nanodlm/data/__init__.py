"""From any source to rows of token ids: download, tokenizer, split, shards, loader."""
