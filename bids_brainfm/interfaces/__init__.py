"""Nipype nodes: unpack inputs, call the rooms below, write files."""
