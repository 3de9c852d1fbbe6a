"""A SimPy world behind the ports: engines at iteration granularity, leases, nodes, trainer phases."""
