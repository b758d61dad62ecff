"""What runs at a client so that its update tells little of its examples."""
