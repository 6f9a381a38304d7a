"""What is written: one module per product, plain functions from derivatives to files."""
