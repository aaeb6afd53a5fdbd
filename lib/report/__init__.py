"""Figures, tables and the HTML report. No torch."""
