"""One participant's side: its session with the server, its connection, its command line."""
