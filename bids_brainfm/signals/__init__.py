"""BOLD file to parcel series, denoised, resampled, scaled, windows; NumPy in, NumPy out."""
