"""What a run reports: metrics, progress, clocks, devices."""
