"""Attention over the paged KV cache, reached through transformers' AttentionInterface."""
