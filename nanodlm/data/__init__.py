"""Turn any source into rows of token ids: download, tokenizer, split, shards, loader.

Every stage is a function `(config, inputs, attempt, emit)` that returns metrics, as `stages/table.py` lists them.
"""
