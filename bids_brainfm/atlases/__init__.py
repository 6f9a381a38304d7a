"""Atlases: parcels with names and places, their images by space, fetching and checking."""
