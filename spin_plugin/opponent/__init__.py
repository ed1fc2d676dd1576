"""The opponent: which weights it has, and what it says of the pairs."""
