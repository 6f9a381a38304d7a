"""The methods text, for a paper."""

from pathlib import Path

from bids_brainfm.bids.writing import write_text

DATA = Path(__file__).parents[1] / 'data' / 'reports'


def methods_path(output: Path) -> Path:
    """Where the methods text stands."""
    return output / 'logs' / 'CITATION.md'


def read_methods(output: Path) -> str:
    """Methods text of an output dataset, empty where there is none."""
    path = methods_path(output)
    return path.read_text() if path.is_file() else ''


def write_methods(output: Path, description: str, citations: list[str]) -> Path:
    """Write ``logs/CITATION.md``.

    Parameters
    ----------
    output : Path
        The output dataset.
    description : str
        The text that the workflow carries, paragraphs between blank lines.
    citations : list of str
        Of the models and atlases; the tools that the text names are added.

    Returns
    -------
    Path
        The file.
    """
    import yaml

    references = citations + yaml.safe_load((DATA / 'references.yml').read_text())
    listed = '\n'.join(f'- {reference}' for reference in dict.fromkeys(references))
    text = f'# Methods\n\n{description.strip()}\n\n# References\n\n{listed}\n'
    return write_text(methods_path(output), text)
