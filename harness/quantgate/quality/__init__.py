"""Quality: golden sets and their locks, scoring through the server, KL against the reference."""
