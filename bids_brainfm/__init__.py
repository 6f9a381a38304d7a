"""fMRI foundation models on fMRIPrep derivatives."""

import os

# Importing Nipype asks the network for its newest version, unless told not to
os.environ.setdefault('NO_ET', '1')
os.environ.setdefault('NIPYPE_NO_ET', '1')
