"""Nipype graphs; the methods text stands beside the nodes it describes."""
