"""Load: seeded workloads, an open-loop client, and paired blocks."""
