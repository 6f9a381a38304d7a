"""Figures of the report and of group results: arrays in, one Matplotlib figure out.

One module per product. Titles state what was found. These parameters are the same everywhere, and
a missing parcel is NaN in all arrays:

xyz : (P, 3) float
    Centres of the parcels in mm, RAS+; NaN where they have none.
names : list of P str
order : (P,) int
    Order of the parcels from top to bottom; `order_label` is what it is called.
tr, start : float
    Repetition time, and time of the first row since the run's first volume, in seconds.
"""
