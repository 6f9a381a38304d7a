"""The methods text, for a paper."""

from pathlib import Path

from bids_brainfm.bids.writing import read_sidecar, write_json, write_text

DATA = Path(__file__).parents[1] / 'data' / 'reports'


def methods_path(output: Path) -> Path:
    """Where the methods text stands."""
    return output / 'logs' / 'CITATION.md'


def read_methods(output: Path) -> str:
    """Methods text of an output dataset, empty where there is none."""
    path = methods_path(output)
    return path.read_text() if path.is_file() else ''


def write_methods(
    output: Path, parts: dict[str, tuple[str, list[str]]], record: bool = True
) -> Path:
    """Write ``logs/CITATION.md``, from the parts of this run and of those before it.

    Parameters
    ----------
    output : Path
        The output dataset.
    parts : dict of str to (str, list of str)
        Name of each kind of output, as in ``logs/settings``: what was done, and what to cite for
        it. The tools that the text names are added.
    record : bool
        Whether the parts are of outputs that are now made, and stay for later runs' texts.

    Returns
    -------
    Path
        The file.
    """
    import yaml

    folder = output / 'logs' / 'methods'
    known = {path.stem: read_sidecar(path) for path in folder.glob('*.json')}
    for name, (text, citations) in parts.items():
        known[name] = {'Text': text, 'References': citations}
        if record:
            write_json(folder / f'{name}.json', known[name])
    ordered = [part for _, part in sorted(known.items()) if part]
    texts = '\n\n'.join(part['Text'].strip() for part in ordered)
    references = [citation for part in ordered for citation in part['References']]
    references += yaml.safe_load((DATA / 'references.yml').read_text())
    listed = '\n'.join(f'- {reference}' for reference in dict.fromkeys(references))
    text = f'# Methods\n\n{texts}\n\n# References\n\n{listed}\n'
    return write_text(methods_path(output), text)
