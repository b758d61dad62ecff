"""What a run leaves: its folder, history, tables, plots, page, observers."""
