"""Verdicts as people and CI systems read them. No decision is taken here."""
