"""Compare the outputs of two runs: ``compare.py OUT OTHER`` exits with 0 where they agree.

Every participant needs a report and every run its embeddings, equal up to rounding.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

out, other = map(Path, sys.argv[1:])
tables = sorted(path.relative_to(out) for path in out.glob('sub-*/func/*_embedding.tsv'))
people = sorted(path.name for path in out.glob('sub-*/'))
if not tables or len(tables) % len(people):
    sys.exit(f'{out} has {len(tables)} embedding tables of {len(people)} participants')
largest = 0
for table in tables:
    one, two = (pd.read_csv(folder / table, sep='\t') for folder in (out, other))
    if list(one) != list(two) or len(one) != len(two):
        sys.exit(f'{table} has another shape in {other}')
    here, there = one.to_numpy(float), two.to_numpy(float)
    if not np.isfinite(here).all():
        sys.exit(f'{table} has values that are no numbers in {out}')
    largest = max(largest, np.abs(here - there).max())
    if not np.allclose(here, there, rtol=1e-4, atol=1e-5):
        sys.exit(f'{table} differs by up to {np.abs(here - there).max():.2g} in {other}')
for person in people:
    report = out / f'{person}.html'
    if '</html>' not in report.read_text():
        sys.exit(f'{report} is no whole page')
print(f'{len(tables)} embedding tables agree, the largest difference is {largest:.2g}')
