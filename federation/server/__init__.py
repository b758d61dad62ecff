"""The server's side: who takes part, the rounds, the asynchronous mode, gRPC, the command line."""
