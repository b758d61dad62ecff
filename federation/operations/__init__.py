"""Work around a run, on the side of the server: it may use all of that side, and nothing there needs it."""
