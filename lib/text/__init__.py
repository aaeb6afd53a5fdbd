"""Texts: schema and import, generation, leakage audit, labels. No torch."""
