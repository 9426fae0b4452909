"""The KV cache: pages, the tensors behind them, and reuse of shared prefixes."""
