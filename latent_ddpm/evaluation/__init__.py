"""Metrics of reconstructions and samples, and image grids."""
