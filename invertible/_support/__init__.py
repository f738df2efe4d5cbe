"""What several parts need: checks, random generators, memory formats; public is only no_trace.

All other parts may import it. It imports ``state``.
"""
