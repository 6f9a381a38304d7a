# shellcheck shell=bash disable=SC2034
# What the jobs of this folder share. Copy the folder, change the paths here, and submit from it.
# Folders have the same path inside the container as outside.

bids=/project/study                              # raw data; only fmriprep.sbatch reads it
fmriprep=/project/study/derivatives/fmriprep     # what fMRIPrep wrote, or will write
output=/project/study/derivatives/brainfm        # one folder for all jobs
work=/scratch/${USER:-$(id -un)}/brainfm                      # of use while a job runs, and not after
models=(brainlm-111m)
participants=participants.txt                    # a line a task: one participant, or several

# Weights and atlases: filled on the login node, see docs/hpc.md
home=/project/software/brainfm-home

# --cleanenv: nothing of the login shell gets in. --nv brings the GPU; on a node without one it
# only says so.
brainfm=(
  apptainer run --cleanenv --nv
  --bind "$fmriprep:$fmriprep:ro" --bind "$output" --bind "$work" --bind "$home:$home:ro"
  --env "BIDS_BRAINFM_HOME=$home"
  /project/software/bids_brainfm.sif
)

# Only for fmriprep.sbatch
run_fmriprep=(
  apptainer run --cleanenv
  --bind "$bids:$bids:ro" --bind "$fmriprep" --bind "$work" --bind /project/software
  /project/software/fmriprep.sif
)
freesurfer_license=/project/software/freesurfer-license.txt
