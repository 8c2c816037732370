"""What it forgets of a text, when, and for which token."""
