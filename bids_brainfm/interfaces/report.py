"""From the derivatives of a participant to the report: everything is read back from disk."""

from pathlib import Path

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    SimpleInterface,
    TraitedSpec,
    traits,
)

from bids_brainfm.bids.writing import read_sidecar
from bids_brainfm.interfaces.embedding import latent_name
from bids_brainfm.interfaces.outcome import read_failures
from bids_brainfm.models.connectome import LABEL as CONNECTOME


def collect_runs(output: Path, subject: str) -> list[dict]:
    """What the sidecars of a participant say, in the form of ``reports.report.write_report``."""
    runs = {}
    for path in sorted((output / f'sub-{subject}').glob('**/*_stat-mean_timeseries.json')):
        sidecar = read_sidecar(path)
        if sidecar is not None:
            runs[path.name.partition('_stat-')[0]] = _series_facts(sidecar)
    for path in sorted((output / f'sub-{subject}').glob('**/*_embedding.json')):
        name, _, rest = path.name.partition('_desc-')
        label = rest.removesuffix('_embedding.json')
        sidecar = read_sidecar(path)
        if sidecar is not None and label != CONNECTOME and name in runs:
            latent = read_sidecar(path.with_name(f'{name}_{latent_name(label)}_boldmap.json'))
            if not latent or latent['InputFiles'] != sidecar['InputFiles']:
                latent = {}
            runs[name]['models'].append(_model_facts(label, sidecar, latent))
            runs[name]['warnings'] += sidecar['Warnings']
    listed = [{'name': name} | facts for name, facts in runs.items()]
    return listed + _failed(output, subject, listed)


def _series_facts(sidecar: dict) -> dict:
    denoising = sidecar['Denoising']
    n_confounds = len(denoising['ConfoundRegressors'])
    inputs = {
        'BOLD': sidecar['Sources'][0],
        'Space': f'{sidecar["Space"]}, atlas image: {sidecar["Atlas"]["Provenance"]}',
        'Volumes': f'{sidecar["NumberOfVolumes"]} at a repetition time of '
        f'{sidecar["RepetitionTime"]:g} s',
        'Left out at the start': f'{sidecar["StartTime"]:g} s (not in steady state)',
        'Flagged volumes': f'{sidecar["NumberOfVolumesFlagged"]} (interpolated)'
        if sidecar['FlaggedVolumesInterpolated']
        else 'not assessed',
        'Denoising': f'{denoising["Name"]}, {n_confounds} confounds regressed out',
        'Mean brain signal': f'{sidecar["BrainMean"]:.1f} (BOLD units)',
        'Parcels below coverage': f'{len(sidecar["ParcelsBelowMinimumCoverage"])} '
        f'(limit {sidecar["MinimumCoverage"]:g})',
    }
    return {
        'inputs': inputs,
        'models': [],
        'atlas': {
            'name': sidecar['Atlas']['Name'],
            'licence': sidecar['Atlas']['License'],
            'citation': sidecar['Atlas']['Citation'],
        },
        'warnings': list(sidecar['Warnings']),
        'failures': [],
    }


def _placement(sidecar: dict) -> dict[str, str]:
    """What placed the parcels, for a model that is given gradients."""
    table, check = sidecar['Model'].get('GradientTable'), sidecar.get('OrderCheck')
    if not table:
        return {}
    found, *others = check['Correlation'].items()
    wrong = ', '.join(f'{r:.2f} ({name})' for name, r in others)
    return {
        'Gradient table': f'{table["Name"]}, sha256 {table["SHA256"]}',
        'Order of parcels': f'correlation of connectivity with nearness in gradient space '
        f'{found[1]:.2f}, in wrong orders {wrong}',
    }


def _model_facts(label: str, sidecar: dict, latent: dict) -> dict:
    model = sidecar['Model']
    resampled = ''
    if sidecar['Resampled']:
        resampled = f', one in {1 / sidecar["SamplingFrequency"]:.5g} s'
        resampled += f' ({sidecar["ResamplingMethod"]})'
    divided = sidecar.get('DividedBy', 1)
    if latent:
        latent = {
            'Latent prediction': f'{latent["Block"]}: mean error {latent["MeanError"]:.3f}, of a '
            f'guess without a model {latent["MeanBaseline"]:.3f}'
        }
    return {
        'label': label,
        'name': model['Name'],
        'trained': model['Trained'],
        'licence': model['License'],
        'citation': ' '.join(model['Citation']),
        'windows': sidecar['NumberOfWindows'],
        'facts': {
            'Weights': model['Weights'],
            'Input': f'{sidecar["WindowSamples"]} samples ({sidecar["WindowLength"]:g} s) a window'
            + resampled,
            'Scaling': sidecar['Scaling'] + (f', divided by {divided:g}' if divided != 1 else ''),
            'Static share': f'{sidecar["StaticVariance"]:.1%} of the variance that the model is '
            f'given does not change over time',
            'Embedding': f'{sidecar["EmbeddingSize"]} dimensions ({sidecar["Pooling"]})',
            'Filled parcels': len(sidecar['FilledParcels']),
            'Ran on': f'{sidecar["Device"]}, {sidecar["Precision"]}',
        }
        | _placement(sidecar)
        | latent,
    }


def _failed(output: Path, subject: str, listed: list[dict]) -> list[dict]:
    """Put failures on record with the run they belong to; those of no listed run are returned."""
    alone = []
    for outcome in read_failures(output, subject):
        atlas, _, model = outcome.step.partition('_')
        reason = outcome.error.removeprefix(f'{outcome.run}: ')
        own = [
            run
            for run in listed
            if run['name'].startswith(f'{outcome.run}_space-') and run['name'].endswith(atlas)
        ]
        if own:
            kept = '' if model else ' What is shown below is of an earlier input.'
            own[0]['failures'].append(reason + kept)
        else:
            facts = {'name': outcome.run, 'inputs': {}, 'models': [], 'atlas': None}
            alone.append(facts | {'warnings': [], 'failures': [reason]})
    return alone


class _ReportInputSpec(BaseInterfaceInputSpec):
    output = traits.Any(mandatory=True, desc='output dataset')
    subject = traits.Str(mandatory=True)
    software = traits.Dict()
    after = traits.List(traits.Any(), desc='what has to be written before')


class _ReportOutputSpec(TraitedSpec):
    report = traits.Any(desc='path of the report')


class WriteReport(SimpleInterface):
    """Write the report of one participant."""

    input_spec = _ReportInputSpec
    output_spec = _ReportOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        from bids_brainfm.reports.methods import read_methods
        from bids_brainfm.reports.report import write_report

        inputs = self.inputs
        runs = collect_runs(inputs.output, inputs.subject)
        self._results['report'] = write_report(
            inputs.output, inputs.subject, runs, read_methods(inputs.output), inputs.software
        )
        return runtime
