"""Studies of single questions. Each is a command."""
