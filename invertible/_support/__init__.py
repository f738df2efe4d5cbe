"""What several folders need; nothing here is public but no_trace."""
