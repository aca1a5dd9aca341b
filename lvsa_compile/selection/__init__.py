"""Which lowering computes a site: what a lowering says of itself, estimates, smoke tests, measuring."""
