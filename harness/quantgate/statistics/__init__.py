"""The tests as pure functions of numbers. Each module states its source and its edge conventions.

`confidence` is always of one tail: an interval at 0.95 leaves 5 % below and 5 % above.
"""
