"""From the derivatives of a participant to the report: everything is read back from disk."""

from pathlib import Path

from bids_brainfm.bids.freshness import read_sidecar
from bids_brainfm.models.connectome import LABEL as CONNECTOME
from bids_brainfm.outputs.embedding import latent_name
from bids_brainfm.outputs.outcome import read_failures


def report(output: Path, subject: str, software: dict[str, str]) -> Path:
    """Write the report of one participant, from what is in the output folder."""
    from bids_brainfm.reports.methods import read_methods
    from bids_brainfm.reports.report import write_report

    runs = collect_runs(output, subject)
    return write_report(output, subject, runs, read_methods(output), software)


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
        if sidecar is None or name not in runs:
            continue
        found = {}
        for what, form in ANALYSES.items():
            content = read_sidecar(path.with_name(f'{name}_{form.format(label)}.json'))
            if content and content['InputFiles'] == sidecar['InputFiles']:
                found[what] = content
                runs[name]['warnings'] += content.get('Warnings', [])
        facts = {what: text for w, c in found.items() for what, text in TEXTS[w](c).items()}
        if label == CONNECTOME:
            runs[name]['inputs'] |= facts
        else:
            runs[name]['models'].append(_model_facts(label, sidecar, facts))
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


def _latent_text(latent: dict) -> dict[str, str]:
    return {
        'Latent prediction': f'{latent["Block"]}: mean error {latent["MeanError"]:.3f}, of a '
        f'guess without a model {latent["MeanBaseline"]:.3f}'
    }


def _pooled(found: dict) -> str:
    return ', '.join(f'{_number(v.get("R2"))} ({way})' for way, v in found['Pooled'].items())


def _number(value) -> str:
    """Two digits, or that there is none.

    >>> _number(0.123), _number(None), _number(float('nan'))
    ('0.12', 'n/a', 'n/a')
    """
    return 'n/a' if value is None or value != value else f'{value:.2f}'


def _reconstruction_text(found: dict) -> dict[str, str]:
    check = found['GainCheck']
    best = max(value for value in check['R2'] if value == value)
    return {
        'Reconstruction': f'R2 {_pooled(found)}; {found["MaskRatio"]:.0%} of the tokens hidden in '
        f'each of {found["NumberOfPasses"]} passes',
        'Gain check': f'best R2 {best:.2f}, when the input is multiplied by {check["Best"]:g}'
        if best > 0
        else 'at no gain is the model nearer than the mean',
    }


def _forecast_text(found: dict) -> dict[str, str]:
    return {
        'Forecast': f'{found["PointsHidden"]} points ({found["Mode"]}), '
        f'{found["NumberOfWindows"]} windows: R2 {_pooled(found)}'
    }


def _attention_text(found: dict) -> dict[str, str]:
    return {'Tokens': found['TokenSpan']} if found.get('TokenSpan') else {}


def _networks_text(found: dict) -> dict[str, str]:
    text = f'{found["NumberOfClusters"]} clusters'
    if found.get('Agreement'):
        index = found['Agreement']['AdjustedRandIndex']
        text += f', adjusted Rand index {_number(index)} with the reference'
    facts = {'Networks': text}
    if found.get('KNN'):
        scores = ', '.join(f'{_number(score)} ({name})' for name, score in found['KNN'].items())
        facts['Networks, held-out parcels'] = f'accuracy {scores}; p = {found["KNNp"]:.2g}'
    return facts


def _perturbation_text(found: dict) -> dict[str, str]:
    return {
        'Perturbation': f'{found["Target"]} at {found["SD"]:+g} SD: {found["ParcelsBelow05"]} of '
        f'{found["ParcelsTested"]} parcels change more than under 95% of sham targets'
    }


def _prediction_text(found: dict) -> dict[str, str]:
    target, n = found['Target'], found['NumberOfWindows']
    values = found['RunPrediction'].values()
    if classes := found.get('Classes'):
        pairs = zip(classes, values, strict=True)
        made = ', '.join(f'{name} with probability {_number(value)}' for name, value in pairs)
    else:
        made = f'{next(iter(values)):.4g}'
    facts = {f'Predicted {target}': f'{made} (mean of {n} window{"s" * (n > 1)})'}
    if 'TestScores' in found:
        baselines = found.get('TestBaselines') or {}
        scored = {'model': found['TestScores']}
        scored |= baselines if isinstance(baselines, dict) else {'baselines': baselines}
        facts['Held-out participants'] = '; '.join(
            f'{name}: {_words(scores)}' for name, scores in scored.items()
        )
    return facts


def _words(content) -> str:
    """What a card tells in a form of its own; scores may be in units of any size.

    >>> _words({'mse': 0.001234, 'n': 40, 'by': {'site A': None}})
    'mse 0.00123, n 40, by (site A n/a)'
    """
    if isinstance(content, dict):
        form = lambda value: f'({_words(value)})' if isinstance(value, dict) else _words(value)
        return ', '.join(f'{key} {form(value)}' for key, value in content.items())
    if content is None or content != content:
        return 'n/a'
    return f'{content:.3g}' if isinstance(content, float) else str(content)


# Sidecars of what is made beside an embedding, {} for its label, and what the report says of them
ANALYSES = {
    'prediction': 'desc-{}_prediction',
    'latent': latent_name('{}') + '_boldmap',
    'attention': 'stat-attention_desc-{}_boldmap',
    'reconstruction': 'stat-r2_desc-{}_boldmap',
    'forecast': 'desc-{}_forecast',
    'networks': 'stat-network_desc-{}_boldmap',
    'perturbation': 'stat-perturbation_desc-{}_boldmap',
}
TEXTS = {
    'prediction': _prediction_text,
    'latent': _latent_text,
    'attention': _attention_text,
    'reconstruction': _reconstruction_text,
    'forecast': _forecast_text,
    'networks': _networks_text,
    'perturbation': _perturbation_text,
}


def _model_facts(label: str, sidecar: dict, analyses: dict[str, str]) -> dict:
    model = sidecar['Model']
    resampled = ''
    if sidecar['Resampled']:
        resampled = f', one in {1 / sidecar["SamplingFrequency"]:.5g} s'
        resampled += f' ({sidecar["ResamplingMethod"]})'
    divided = sidecar.get('DividedBy', 1)
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
        | analyses,
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
