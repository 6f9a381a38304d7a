"""The table of products: every kind of output, once, with its options.

The command line, its checks, the settings records, the methods text and the report follow from
it. Standard library only, so that ``--help`` stays instant; the functions of a product are in the
module that the table names, described in :mod:`bids_brainfm.outputs.products`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bids_brainfm.arguments import clusters, count, dummies, finite, not_negative, positive, ratio

ALL = 'all'
EMBEDDINGS = 'embeddings'
# Blocks of a window whose latents can be predicted, as in models.masking
BLOCKS = ('cross-time', 'cross-roi', 'double-cross')


@dataclass(frozen=True)
class Option:
    """A command line option of one or several products."""

    name: str  # among the settings; the flags follow: --mask-ratio and --mask_ratio
    help: str
    type: Callable[[str], Any] | None = None  # makes a value of the text
    choices: tuple[str, ...] = ()
    metavar: str | tuple[str, ...] | None = None
    nargs: str | int | None = None
    switch: bool = False  # whether it takes no value

    @property
    def flag(self) -> str:
        """The flag as messages give it."""
        return f'--{self.name.replace("_", "-")}'

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Add the option to a group of a parser."""
        flags = dict.fromkeys((self.flag, f'--{self.name}'))
        if self.switch:
            group.add_argument(*flags, action='store_true', default=None, help=self.help)
            return
        names = ('type', 'choices', 'metavar', 'nargs')
        given = {name: value for name in names if (value := getattr(self, name))}
        group.add_argument(*flags, help=self.help, **given)


@dataclass(frozen=True)
class Product:
    """One kind of output.

    Its suffix and ``stat`` entity are those of its first table, which names it on disk. What it
    needs is ``bold``, ``series``, ``model`` (what any model makes of a run), ``outputs`` (what
    other products wrote), or the capability that a model must have, a key of `LACKING`.
    """

    name: str
    scope: Literal['run', 'participant', 'group']  # what one set of its files is about
    module: str  # of its functions, in bids_brainfm.outputs
    suffix: str = ''
    stat: str = ''
    # Name of its settings record and its part of the methods text, with the fields {atlas} and
    # {label}; empty where those of another product hold for it, too
    record: str = ''
    # Word of --outputs; empty where it is always made, or where its options say so
    output: str = ''
    about: str = ''  # what that word adds, for the help text
    needs: str = 'model'
    options: tuple[Option, ...] = ()
    image: bool = False  # whether there is an image of its table, a map
    desc: str = ''  # its ``desc`` entity, where that is not the label of a model
    # Raised whenever its numbers change: outputs of an earlier version are never used again
    version: int = 1
    reads: tuple[str, ...] = ()  # products whose files a product that needs ``outputs`` reads

    @property
    def results_version(self) -> int:
        """A number that rises with its own version and those of what it is made from."""
        made_from = {'bold': (), 'outputs': self.reads}.get(self.needs, ('series',))
        return self.version + sum(BY_NAME[name].results_version for name in made_from)


# Why models that lack a capability are refused
LACKING = {
    'reconstructs': 'has no decoder, as BrainLM has: leave it out, or add a BrainLM with --model.',
    'predicts_latents': 'predicts no latents, as Brain-JEPA does: leave it out.',
    'head': 'has no head: fine-tune a model first.',
}

MASK_RATIO = Option(
    'mask_ratio', 'proportion of tokens hidden in a pass of reconstruction and perturbation '
    '(default: what the model was trained with)', type=ratio, metavar='PROPORTION',
)  # fmt: skip
REFERENCE_NETWORKS = Option(
    'reference_networks', 'table (TSV) with the columns name and network of the parcels, one for '
    'each atlas (default: the networks that come with the atlas)', type=Path, metavar='FILE',
    nargs='+',
)  # fmt: skip

COVARIANCE = Option(
    'covariance', 'covariance between parcels of other participants, for the covariance baseline '
    'of reconstruction, one file for each atlas (default: it is estimated from what is visible of '
    'the run); at the group level, without a file: fit it over all runs in the output folder',
    type=Path, metavar='FILE', nargs='*',
)  # fmt: skip

# Of denoising: those of `signals.strategy.override`, and where further tables are
DENOISING = (
    Option('bandpass', 'band in Hz that is kept, such as 0.01 0.08; 0 leaves an end open. Cosines '
           "outside it join the other regressors, in place of fMRIPrep's (default: what the "
           'strategy says)', type=not_negative, metavar=('LOW', 'HIGH'), nargs=2),
    Option('fd_threshold', 'framewise displacement above which a volume is flagged; 0: none '
           '(default: what the strategy says, 0.5 in ours)', type=not_negative, metavar='MM'),
    Option('dvars_threshold', 'standardised DVARS above which a volume is flagged; 0: none '
           '(default: what the strategy says, 1.5 in ours)', type=not_negative, metavar='VALUE'),
    Option('scrub', 'also flag segments of fewer unflagged volumes than this (default: 0, and 5 '
           'with --denoise scrubbing)', type=count, metavar='VOLUMES'),
    Option('dummy_scans', 'volumes to drop at the start; auto: those that fMRIPrep found not to '
           'be in steady state (default: auto)', type=dummies, metavar='{N,auto}'),
    Option('keep_nonsteady', 'keep volumes that are not in steady state', switch=True),
    Option('custom_confounds', 'folder of tables with further confounds, each with the name of '
           "the run's confounds table; all columns are regressed out. Components of ICA-AROMA and "
           'tedana are looked for in it, too', type=Path, metavar='DIR'),
    Option('motion_filter_type', 'filter that removes respiration from the motion parameters: a '
           'band (notch), or all above --band-stop-min (lp) (default: none)',
           choices=('notch', 'lp')),
    Option('band_stop_min', 'lower end of that band in breaths per minute', type=positive(float),
           metavar='BPM'),
    Option('band_stop_max', 'upper end of that band in breaths per minute', type=positive(float),
           metavar='BPM'),
    Option('motion_filter_order', 'order of that filter, forwards and backwards; a multiple of 4 '
           'for notch, of 2 for lp (default: 4)',
           type=positive(int), metavar='N'),
    Option('head_radius', 'radius with which framewise displacement is computed anew (default: 50 '
           'where motion is filtered; else it is that of fMRIPrep)', type=positive(float),
           metavar='MM'),
    Option('min_dof', 'least number of residual degrees of freedom; a run with fewer fails '
           '(default: 20)', type=count, metavar='N'),
    Option('min_minutes', 'least amount of unflagged data; a run with less fails (default: 0)',
           type=not_negative, metavar='MINUTES'),
)  # fmt: skip

PRODUCTS = (
    Product('series', 'run', 'series', 'timeseries', 'mean', 'atlas-{atlas}', needs='bold',
            version=2),
    Product('connectome', 'run', 'connectome', 'relmat', 'pearsoncorrelation', needs='series'),
    Product('quality', 'run', 'quality', 'bold', needs='series', desc='quality'),
    Product(
        'embedding', 'run', 'embedding', 'embedding', record='desc-{label}', options=(
            Option('token_shuffles', 'average embeddings and reconstructions over N random orders '
                   'of the tokens, for the 13M BrainLM, which was trained on shuffled tokens and '
                   'to which their order matters; takes N times as long (default: the order of '
                   'the atlas, once)', type=positive(int), metavar='N'),
        ),
    ),
    Product('prediction', 'run', 'prediction', 'prediction', needs='head', version=2),
    Product(
        'prediction_error', 'run', 'prediction_error', 'boldmap', 'latenterror',
        record='stat-latenterror_desc-{label}', needs='predicts_latents', options=(
            Option('latent_prediction', 'block of each window whose latents Brain-JEPA predicts '
                   'from the rest, for a map of the prediction error: the last time patches, '
                   'every second parcel, or both (default: cross-time)',
                   choices=(*BLOCKS, 'none')),
        ),
    ),
    Product(
        'reconstruction', 'run', 'reconstruction', 'boldmap', 'r2',
        record='reconstruction_desc-{label}', output='reconstruction',
        about='the run from its visible tokens (BrainLM)', needs='reconstructs', image=True,
        version=2, options=(
            MASK_RATIO, COVARIANCE,
            Option('aggregate', 'what to take where several passes hid a token: the first one, or '
                   'the mean of all (default: first)', choices=('first', 'mean')),
            Option('write_bold', 'also write the reconstruction as BOLD on the grid of the input: '
                   'NIfTI, or CIFTI', switch=True),
        ),
    ),
    Product(
        'forecast', 'run', 'forecast', 'forecast', record='forecast_desc-{label}',
        output='forecast', about='the end of each window from its beginning (BrainLM)',
        needs='reconstructs', version=2, options=(
            Option('forecast_points', "samples to forecast, at the model's TR (default: a "
                   'tenth of the window, 20 of 200)', type=positive(int), metavar='SAMPLES'),
            Option('forecast_mode', 'hide exactly these samples, or all tokens that hold any of '
                   'them (default: predict_last_pixel)',
                   choices=('predict_last_pixel', 'predict_last')),
        ),
    ),
    Product('attention', 'run', 'attention', 'boldmap', 'attention', 'networks_desc-{label}',
            'networks', 'attention maps', image=True, version=2),
    Product(
        'networks', 'participant', 'networks', 'boldmap', 'network',
        record='atlas-{atlas}_networks', output='networks',
        about='functional networks (all models, and connectivity)', needs='outputs',
        reads=('connectome', 'attention', 'embedding'), options=(
            Option('network_clusters', 'number of networks to find; auto: that with the best '
                   'silhouette (default: as many as there are reference networks, else auto)',
                   type=clusters, metavar='{N,auto}'),
            REFERENCE_NETWORKS,
        ),
    ),
    Product(
        'perturbation', 'run', 'perturbation', 'boldmap', 'perturbation',
        record='perturbation_desc-{label}', output='perturbation',
        about='the effect of one region on the others (BrainLM)', needs='reconstructs', image=True,
        version=2, options=(
            MASK_RATIO, REFERENCE_NETWORKS,
            Option('perturb', 'parcel or reference network to perturb (default: the parcel '
                   'nearest to the left primary visual cortex)', metavar='NAME'),
            Option('perturb_sd', 'size of the perturbation in SD of the parcel, negative for a '
                   'decrease (default: 1)', type=finite, metavar='K'),
            Option('perturb_mode', 'pulse: add it for the length of one token, at several times; '
                   'clamp: hold the parcel at its mean plus so much throughout the window, far '
                   'outside what data do (default: pulse)', choices=('pulse', 'clamp')),
        ),
    ),
    Product('scale_stats', 'group', 'scale_stats', needs='outputs', reads=('series',)),
    Product('covariance', 'group', 'covariance', needs='outputs', reads=('series',),
            options=(COVARIANCE,)),
    Product(
        'contrast', 'group', 'contrast', needs='outputs', reads=('attention',), version=2,
        options=(
            Option('contrast', 'at the group level, attention maps of A minus those of B, where '
                   'WHAT is an entity of the runs (task nback rest) or a column of '
                   'participants.tsv (sex F M)', metavar=('WHAT', 'A', 'B'), nargs=3),
        ),
    ),
)  # fmt: skip

BY_NAME = {product.name: product for product in PRODUCTS}
OF_SERIES = tuple(product for product in PRODUCTS if product.needs in ('bold', 'series'))
# Those made from what a model makes of one run
OF_MODELS = tuple(p for p in PRODUCTS if p.needs == 'model' or p.needs in LACKING)
# Suffixes of our tables, in the order of the table
SUFFIXES = tuple(dict.fromkeys(product.suffix for product in PRODUCTS if product.suffix))
# Words of --outputs, in the order of the table
OUTPUTS = tuple(dict.fromkeys([EMBEDDINGS, *(p.output for p in PRODUCTS if p.output)]))


def about_outputs() -> str:
    """What each word of ``--outputs`` adds, for the help text."""
    found = {word: [p.about for p in PRODUCTS if p.output == word] for word in OUTPUTS[1:]}
    return '; '.join(f'{word}: {" and ".join(about)}' for word, about in found.items())


def options() -> dict[str, Option]:
    """All options of denoising and of the table by their names, each once."""
    of_products = [option for product in PRODUCTS for option in product.options]
    return {option.name: option for option in (*DENOISING, *of_products)}


def used_by(option: str) -> tuple[str, ...]:
    """Words of ``--outputs`` whose products use an option; empty for those made without one."""
    found = (p.output for p in PRODUCTS if option in {each.name for each in p.options})
    return tuple(dict.fromkeys(filter(None, found)))
