"""Images: reading them, what a network is shown of each, and which comes when."""
