"""``bids_brainfm_demo``: simulate a small dataset and run the real command on it."""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np

from bids_brainfm import surroundings
from bids_brainfm.bids.files import write_json
from bids_brainfm.errors import BrainfmError

MODELS, ATLAS = ('brainlm-demo', 'brain-jepa-demo'), 'Demo424'
SPACE, TASK, TR = 'MNI152NLin2009cAsym', 'rest', 0.735
# The field of view of the template at a coarse voxel size keeps the files small.
SHAPE, VOXEL_MM = (49, 58, 49), 4.0
AFFINE = np.array([[4, 0, 0, -96], [0, 4, 0, -132], [0, 0, 4, -78], [0, 0, 0, 1.0]])
SIMULATOR = 'bids_brainfm_demo'
SIMULATED = 'SIMULATED data: nobody was scanned and fMRIPrep was not run.'
DESCRIPTION = {
    'Name': 'Simulated resting-state fMRI, laid out as fMRIPrep writes it',
    'BIDSVersion': '1.10.0',
    'DatasetType': 'derivative',
    'License': 'CC0',
    'GeneratedBy': [{'Name': SIMULATOR, 'Version': '1', 'Description': SIMULATED}],
}
README = """Simulated data for demonstration. Nobody was scanned and fMRIPrep was not run: parcel
series, head motion and the other confounds come from a random number generator and
were painted into volumes on an MNI grid, in the layout of fMRIPrep output.
"""
COLUMNS = {
    'age': {'Description': 'Simulated age', 'Units': 'year'},
    'trait': {
        'Description': 'Simulated trait (standard normal): with it rise the coherence of '
        'networks and the coupling of the default-mode and the frontoparietal network'
    },
}


def get_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(
        prog='bids_brainfm_demo',
        description='Simulate a small dataset laid out as fMRIPrep writes it (OUTDIR/data), run '
        'bids_brainfm on it with the embedded models and atlas, and say where the report is '
        '(OUTDIR/out). Further options are passed on to bids_brainfm.',
    )
    parser.add_argument('outdir', metavar='OUTDIR', type=Path)
    parser.add_argument('--participants', type=int, default=3, help='default: 3')
    words = 'length of a run (TR 0.735 s; default: 490)'
    parser.add_argument('--volumes', type=int, default=490, help=words)
    return parser


def write_dataset(folder: Path, participants: int = 3, volumes: int = 490, seed: int = 0) -> None:
    """Write a simulated dataset in the layout of fMRIPrep's output.

    `folder` must not exist; it appears when it is complete. The same seed gives the same files.
    """
    import pandas as pd

    from bids_brainfm.atlases.atlas import load_atlas
    from bids_brainfm.resources import home
    from bids_brainfm.signals.simulate import express, simulate_run

    atlas = load_atlas(ATLAS, home())
    parcel, brain = _grid_labels(atlas.image_for(SPACE, VOXEL_MM).path)
    part = folder.with_name(f'.{folder.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)

    rng = np.random.default_rng(seed)
    people = pd.DataFrame({'participant_id': [f'sub-{i + 1:02d}' for i in range(participants)]})
    people['age'] = rng.integers(20, 75, participants)
    people['trait'] = rng.standard_normal(participants).round(3)
    people.to_csv(part / 'participants.tsv', sep='\t', index=False)
    write_json(part / 'participants.json', COLUMNS)
    write_json(part / 'dataset_description.json', DESCRIPTION)
    (part / 'README').write_text(README)
    # The validator knows no suffix for confounds; fMRIPrep ships such a file as well.
    (part / '.bidsignore').write_text('*_timeseries.*\n')
    for person in people.itertuples():
        func = part / person.participant_id / 'func'
        func.mkdir(parents=True)
        run = simulate_run(atlas.xyz, volumes, TR, rng=rng, **express(person.trait))
        stem = f'{func}/{person.participant_id}_task-{TASK}'
        table = {'sep': '\t', 'index': False, 'na_rep': 'n/a', 'float_format': '%.8g'}
        run.confounds.to_csv(f'{stem}_desc-confounds_timeseries.tsv', **table)
        write_json(Path(f'{stem}_desc-confounds_timeseries.json'), run.components)
        _write_images(f'{stem}_space-{SPACE}', run.series, parcel, brain, rng)
    part.replace(folder)


def _grid_labels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Parcel labels and brain mask (bool) on the dataset's grid, by nearest neighbour."""
    import nibabel as nib
    from nibabel.processing import resample_from_to
    from nilearn.datasets import load_mni152_brain_mask

    grid = (SHAPE, AFFINE)
    labels = resample_from_to(nib.load(path), grid, order=0)
    mask = load_mni152_brain_mask(resolution=2)
    mask = nib.Nifti1Image(np.asanyarray(mask.dataobj).astype(np.uint8), mask.affine)
    brain = np.asanyarray(resample_from_to(mask, grid, order=0).dataobj) > 0
    labels = np.asanyarray(labels.dataobj).astype(np.int32)
    return labels, brain | (labels > 0)


def _write_images(
    stem: str, series: np.ndarray, parcel: np.ndarray, brain: np.ndarray, rng: np.random.Generator
) -> None:
    """Paint parcel series (T, P) into the brain, with a texture and noise for every voxel."""
    voxels = parcel[brain]
    white_matter = np.full((len(series), 1), 9000, np.float32)  # label 0: level only
    signal = np.concatenate([white_matter, series], axis=1)[:, voxels]
    signal *= 1 + 0.04 * rng.standard_normal(voxels.size, np.float32)
    signal += 80 * rng.standard_normal(signal.shape, np.float32)
    bold = np.zeros((*SHAPE, len(series)), np.int16, order='F')
    bold[brain] = np.rint(signal).astype(np.int16).T

    _write_nifti(Path(f'{stem}_desc-preproc_bold.nii.gz'), bold)
    sidecar = {'RepetitionTime': TR, 'TaskName': TASK, 'SkullStripped': False}
    sidecar |= {'SliceTimingCorrected': False, 'Description': 'Simulated'}
    write_json(Path(f'{stem}_desc-preproc_bold.json'), sidecar)
    _write_nifti(Path(f'{stem}_desc-brain_mask.nii.gz'), brain.astype(np.uint8))
    write_json(Path(f'{stem}_desc-brain_mask.json'), {'Type': 'Brain', 'Description': 'Brain'})


def _write_nifti(path: Path, data: np.ndarray) -> None:
    import nibabel as nib

    image = nib.Nifti1Image(data, AFFINE)
    image.header.set_xyzt_units('mm', 'sec')
    if data.ndim == 4:
        image.header.set_zooms((VOXEL_MM, VOXEL_MM, VOXEL_MM, TR))
    for set_form in (image.set_sform, image.set_qform):
        set_form(AFFINE, 'mni')
    image.to_filename(path)


def prepare_dataset(data: Path, participants: int, volumes: int) -> None:
    """Simulate the dataset, unless an earlier command did; refuse a folder of other data."""
    description = data / 'dataset_description.json'
    ours = description.is_file() and SIMULATOR in description.read_text(encoding='utf-8')
    if data.exists() and not ours:
        raise BrainfmError(f'{data} is not a dataset of this demo: name another folder.')
    if not data.exists():
        print(f'Simulating {participants} participants in {data}', flush=True)
        write_dataset(data, participants, volumes)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code of ``bids_brainfm``."""
    try:
        with surroundings.explained():
            if argv is None:
                surroundings.prepare()
            options, passed_on = get_parser().parse_known_args(argv)
            data, out = options.outdir / 'data', options.outdir / 'out'
            prepare_dataset(data, options.participants, options.volumes)
    except BrainfmError as error:
        print(f'bids_brainfm_demo: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('bids_brainfm_demo was stopped.', file=sys.stderr)
        return 130

    from bids_brainfm.cli.run import main as run_app

    work = options.outdir / 'work'
    arguments = [data, out, 'participant', '--model', *MODELS, '-w', work, *passed_on]
    print(f'bids_brainfm {" ".join(map(str, arguments))}', flush=True)
    code = run_app([str(argument) for argument in arguments])
    if code == 0:
        print(f'The report is {out / "sub-01.html"}: open it in a browser.')
    return code


if __name__ == '__main__':
    sys.exit(main())
