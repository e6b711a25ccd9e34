"""Monitoring of a run: metrics, progress, clocks, devices."""
