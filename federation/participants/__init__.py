"""Who takes part in a run, and whether what they bring fits together: at the server, without a clock or a network."""
