"""What is computed with encoders and from what they are given: NumPy in, NumPy out."""
