"""Devices and processes: the mesh, sharding rules, several processes as one run."""
