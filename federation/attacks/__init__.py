"""What can be read from updates by who has them; nothing of it runs in a federation."""
