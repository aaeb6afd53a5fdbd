"""Calibrated statistics: numpy and scipy (scikit-learn where speed does not matter). No torch, no files."""
