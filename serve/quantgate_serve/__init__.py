"""The built-in batched server: one model, one device, OpenAI-compatible."""
