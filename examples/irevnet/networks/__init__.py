"""The networks: i-RevNets, and those that they are compared with."""
