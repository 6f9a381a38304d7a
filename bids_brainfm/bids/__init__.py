"""Reading fMRIPrep derivatives, naming and writing ours."""
