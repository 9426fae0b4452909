"""Golden sets made of what people have: tables, and tasks of lm-evaluation-harness."""
