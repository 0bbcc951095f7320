"""What this process may use of its machine, and code of the user's own."""
