"""What the analyses of the paper have in common."""
