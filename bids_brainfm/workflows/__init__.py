"""Nipype graphs; the methods text is kept with the nodes it describes."""
