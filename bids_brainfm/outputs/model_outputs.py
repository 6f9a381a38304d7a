"""All that one model writes for a run: embeddings, and the analyses that were asked for."""

import dataclasses

from bids_brainfm.bids.freshness import input_fingerprints, is_current, is_whole, sidecar_path
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.outputs import attention, forecast, perturbation, reconstruction
from bids_brainfm.outputs.context import Context, picture_path
from bids_brainfm.outputs.embedding import (
    EncodeTask,
    common_metadata,
    embedding_current,
    write_outputs,
)

# Each is a module of the same form: NAME (of --outputs), PICTURES (for the report), SETTINGS (of
# AnalysisSettings, that a dataset holds one set of), paths, pattern, text and write.
ANALYSES = (attention, reconstruction, forecast, perturbation)


def analyses_of(task: EncodeTask) -> list:
    """Analyses that a task asks for."""
    return [analysis for analysis in ANALYSES if analysis.NAME in task.analyses.outputs]


def analysis_name(analysis, label: str) -> str:
    """What an analysis of a model is called among settings and methods."""
    return f'{analysis.NAME}_desc-{label}'


def run_current(run: BoldRun, task: EncodeTask) -> bool:
    """Whether all that a task writes for a run stands and fits the inputs."""
    return embedding_current(run, task) and all(
        _analysis_current(analysis, run, task) for analysis in analyses_of(task)
    )


def _analysis_current(analysis, run: BoldRun, task: EncodeTask) -> bool:
    first, *others = analysis.paths(run, task)
    inputs = input_fingerprints(run)
    whole = all(is_whole(path) for path in others)
    return whole and is_current(first, inputs)


def write_run(
    run: BoldRun, task: EncodeTask, atlas, data, windows, encoding, encoder, exact
) -> None:
    """Write what a model says of a run, but for what stands already.

    Parameters
    ----------
    run : BoldRun
    task : EncodeTask
    atlas : Atlas
    data : ModelInput
        The run in the model's units.
    windows : Windows
        What was encoded.
    encoding : Encoding
    encoder, exact : Encoder
        As the task says, and in float32.
    """
    write_outputs(run, task, atlas, windows, data.donors, encoding)
    common = common_metadata(run, task)
    context = Context(run, task, atlas, data, encoder, exact, encoding, common)
    asked = analyses_of(task)
    for analysis in ANALYSES:
        if _analysis_current(analysis, run, task):
            continue
        # what stands is of an earlier input; a sidecar goes first, so that nothing half new stays
        remove(analysis, run, task)
        if analysis in asked:
            analysis.write(context)


def remove(analysis, run: BoldRun, task: EncodeTask) -> None:
    """Remove the files of an analysis, those included that are not asked for now."""
    whole = dataclasses.replace(task, analyses=dataclasses.replace(task.analyses, bold=True))
    files = analysis.paths(run, whole)
    sidecars = [sidecar_path(path) for path in files]
    pictures = [picture_path(run, task, what) for what in analysis.PICTURES]
    for path in (*sidecars, *files, *pictures):
        path.unlink(missing_ok=True)
