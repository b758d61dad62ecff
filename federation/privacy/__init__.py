"""What leaves a client beside its model, and what makes its update tell little of its examples."""
