"""Speed against dense attention, measured as ratios in one process behind a correctness gate."""
