"""What each party proves and encrypts: TLS, certificates."""
